"""The pre-tokenizer of a byte-level BPE as llama.cpp calls it.

Its converter knows one by a digest of the ids that a text becomes, which are others in a trimmed vocabulary: then it has to be told
(``to_gguf.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_prune.files.documents import read_json

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASH = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)


class _Steps(NamedTuple):
    """What splits a text before merges: regular expressions, single digits, and GPT-2's expression; and whether a piece that is a
    token is taken whole, without merges."""

    split: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    whole: bool = False


NAMES = {
    _Steps(gpt2=True): "gpt-2",
    _Steps(digits=True, gpt2=True): "smollm",
    _Steps(split=(rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}{_REST}",), whole=True): "llama-bpe",
    _Steps(split=(rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}{_REST}",)): "smaug-bpe",
    _Steps(split=(rf"{_SHORT}|{_LETTERS}|\p{{N}}{_REST}",)): "qwen2",
    _Steps(split=(rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}{_SLASH}",), whole=True): "tekken",
    _Steps(split=(rf"{_WORDS[0]}{_SHORT}?|{_WORDS[1]}{_SHORT}?|\p{{N}}{{1,3}}{_SLASH}",)): "gpt-4o",
}
"""What ``tokenizer.json`` says → the name that stands for the same expressions in llama.cpp (``src/llama-vocab.cpp``)."""

UNKNOWN = ""


def pre_tokenizer_of(folder: Path) -> str | None:
    """llama.cpp's name of a directory's pre-tokenizer; :data:`UNKNOWN` where :data:`NAMES` has none; ``None`` where the converter
    asks for none: it reads a SentencePiece model, or a tokenizer that is no byte-level BPE.

    Raises:
        CheckpointError: if ``tokenizer.json`` is damaged.
    """
    if (folder / "tokenizer.model").is_file() or not (folder / "tokenizer.json").is_file():
        return None
    said = read_json(folder / "tokenizer.json")
    steps = _steps(said.get("pre_tokenizer"))
    model = said.get("model")
    bpe = isinstance(model, dict) and model.get("type", "BPE") == "BPE"
    level = [step for step in steps if step.get("type") == "ByteLevel"]
    if not bpe or not level:
        return None
    others = [step for step in steps if step.get("type") != "ByteLevel"]
    split = tuple(text for step in others if (text := _expression(step)) is not None)
    digits = [step for step in others if step.get("type") == "Digits" and step.get("individual_digits")]
    if len(split) + len(digits) < len(others) or any(step.get("add_prefix_space", True) for step in level):
        return UNKNOWN
    gpt2 = any(step.get("use_regex", True) for step in level)
    return NAMES.get(_Steps(split, bool(digits), gpt2, bool(model.get("ignore_merges"))), UNKNOWN)


def _steps(said: Any) -> list[dict[str, Any]]:
    """Every step of a pre-tokenizer, those of sequences too."""
    if not isinstance(said, dict):
        return []
    parts = said.get("pretokenizers") if said.get("type") == "Sequence" else None
    return [step for part in parts for step in _steps(part)] if isinstance(parts, list) else [said]


def _expression(step: dict[str, Any]) -> str | None:
    """The regular expression of a step whose matches are pieces of their own."""
    pattern = step.get("pattern")
    plain = step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    found = pattern.get("Regex") if plain and isinstance(pattern, dict) else None
    return found if isinstance(found, str) else None


def advice(folder: Path, *, trimmed: bool, nemotron_nas: bool) -> str:
    """What is said of a directory that llama.cpp's converter will not take by itself; ``""`` where there is nothing to say.

    Args:
        trimmed: its vocabulary is smaller than that of the model it comes from.
        nemotron_nas: the form of its ``config.json``.
    """
    name = pre_tokenizer_of(folder) if trimmed or nemotron_nas else None
    if name is None:
        return ""
    why = "knows pre-tokenizers by ids, which are others in a trimmed vocabulary" if trimmed else _NAS
    known = f"this one is {name}" if name else "this one is none that is known here: name it with --pre"
    return f"for GGUF: python {TOOL} CONVERT_HF_TO_GGUF.PY MODEL, since llama.cpp's own converter {why}; {known}"


TOOL = Path(__file__).resolve().with_name("to_gguf.py")
"""The program that hands llama.cpp's converter the name."""

_NAS = "knows the pre-tokenizers of nemotron-nas models at 128,256 tokens alone"
