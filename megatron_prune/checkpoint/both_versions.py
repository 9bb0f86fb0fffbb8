"""What a changed model's files say twice, so that transformers 4 and 5 read the same model and the same tokenizer.

transformers 5 renamed keys and reads the old names; transformers 4 passes the new ones over without a word. A file that is
written back unchanged is left alone.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.families.family import family_of
from megatron_prune.files.documents import read_json

log = logging.getLogger("megatron_prune")

_TABLE = "tokenizer.json"
_OWN_ENDS = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
SIDE_FILES = GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"


def describe(hf_config: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of a changed model.

    Args:
        hf_config: what transformers 5 reads as ``config``.
        dtype: element type of most weights.
    """
    found = dict(hf_config)
    for entries in family_of(hf_config).entries:
        if entries.renamed(config):
            found = entries.rewritten(found, config)
    found["dtype"] = found["torch_dtype"] = str(dtype).removeprefix("torch.")
    return _without_absent(found, config.vocab_size, "config.json")


def rewrite_side_files(folder: Path, vocab_size: int | None = None) -> None:
    """Mend the tokenizer's and the generation's settings in a directory that is being written.

    Args:
        vocab_size: of the model; token ids beyond are left out.
    """
    for name in SIDE_FILES:
        if (folder / name).is_file():
            mended = settings(folder, name, vocab_size)
            if mended != read_json(folder / name):
                (folder / name).write_text(json.dumps(mended, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settings(folder: Path, name: str, vocab_size: int | None = None) -> dict[str, Any]:
    """What one of :data:`SIDE_FILES` says, in words that both read.

    Args:
        vocab_size: as for :func:`rewrite_side_files`.
    """
    data = read_json(folder / name)
    return _with_ends(_tokenizer(data), folder) if name == TOKENIZER else _without_absent(data, vocab_size, name)


def _tokenizer(data: dict[str, Any]) -> dict[str, Any]:
    found = dict(data)
    if found.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's new name
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):  # transformers 4 wants names for them, and has this list
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def _with_ends(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Whether a text begins with BOS and ends with EOS: Llama's class in transformers 4 has its own mind where nothing says it."""
    ends = ("add_bos_token", "add_eos_token")
    if data.get("tokenizer_class") not in _OWN_ENDS or any(key in data for key in ends) or not (folder / _TABLE).is_file():
        return data
    processor = read_json(folder / _TABLE).get("post_processor") or {}
    try:
        steps = [step for part in processor.get("processors", [processor]) for step in part.get("single", ())]
        special = ["SpecialToken" in step for step in (steps[:1] + steps[-1:] if steps else [{}, {}])]
    except (AttributeError, TypeError):  # a damaged table: whoever reads it says so
        return data
    return {**data, **dict(zip(ends, special))}


def _without_absent(data: dict[str, Any], vocab_size: int | None, where: str) -> dict[str, Any]:
    """Token ids that have no row are left out (null: a key that is missing would mean the class's default)."""

    def present(token: Any) -> bool:
        return not isinstance(token, int) or 0 <= token < vocab_size

    found = dict(data)
    for key, value in data.items():
        if vocab_size is None or not (key.endswith("_token_id") or key.endswith("suppress_tokens")):
            continue
        if isinstance(value, list) and not all(map(present, value)):
            found[key] = [token for token in value if present(token)] or None
        elif not present(value):
            found[key] = None
        if found[key] != value:
            log.warning("%s: %s %s names no row of the vocabulary and is left out", where, key, value)
    return found
