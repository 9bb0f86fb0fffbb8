"""``vocab.json`` and ``merges.txt``: the byte-level BPE of GPT-2 and of those after it, before ``tokenizer.json``."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import read_json, read_text
from megatron_prune.text.encoder import load_tokenizer, tokenizer_errors
from megatron_prune.vocabulary.kinds.tokenizer_json import TokenizerJson
from megatron_prune.vocabulary.tokenizer_file import KINDS, TokenizerFile

VOCAB, MERGES = "vocab.json", "merges.txt"


@KINDS.register("merges_txt")
class MergesTxt(TokenizerFile):
    """A pair of files; what they leave unsaid (how a text is split) is what transformers takes for the model."""

    rank = 3
    added: dict[int, str] = {}

    @classmethod
    def find(cls, folder: Path) -> TokenizerFile | None:
        return cls(folder / VOCAB) if (folder / VOCAB).is_file() and (folder / MERGES).is_file() else None

    def __init__(self, path: Path):
        self.path = path
        self._lines = read_text(path.with_name(MERGES)).split("\n")
        vocab = read_json(path, dict[str, int], do="fetch it again")
        model = {"type": "BPE", "vocab": vocab, "merges": [line for line in self._lines if _is_rule(line)]}
        if any(piece.endswith("</w>") for piece in vocab):
            raise CheckpointError(f"{path} marks the ends of words with </w>", needed="byte-level BPE: others cannot be trimmed")
        content = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}
        self._tables = TokenizerJson(path, json.dumps(content).encode())
        self.pieces, self.pinned, self.joins = self._tables.pieces, self._tables.pinned, self._tables.joins
        self.missing_bytes = self._tables.missing_bytes

    @functools.cached_property
    def _runtime(self) -> Any:
        return load_tokenizer(self.path.parent)

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        runtime = self._runtime
        with tokenizer_errors(f"{self.path} cannot encode a text", CheckpointError):
            return runtime(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        runtime = self._runtime
        with tokenizer_errors(f"{self.path} cannot say the text of tokens", CheckpointError):
            return runtime.decode(list(ids), skip_special_tokens=True)

    def splitter(self, kept: Mapping[int, int]) -> Callable[[int], list[int]]:
        return self._tables.splitter(kept)

    def write(self, folder: Path, new_ids: Mapping[int, int]) -> None:
        kept = {piece: new_ids[number] for piece, number in self.joins.ids.items() if number in new_ids}
        vocab = dict(sorted(kept.items(), key=lambda pair: pair[1]))
        (folder / VOCAB).write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = [line for line in self._lines if not _is_rule(line) or _stays(line, kept)]
        (folder / MERGES).write_text("\n".join(lines), encoding="utf-8")


def _is_rule(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#version")


def _stays(line: str, kept: Mapping[str, int]) -> bool:
    left, right = line.split(" ")
    return left in kept and right in kept and left + right in kept
