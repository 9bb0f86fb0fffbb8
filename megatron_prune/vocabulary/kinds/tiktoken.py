"""Rank files of tiktoken (``qwen.tiktoken``, ``tiktoken.model``): a line is a token in base64 and its rank, which is its id."""

from __future__ import annotations

import ast
import base64
import functools
import re
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from megatron_prune.errors import CheckpointError, raise_all, reason
from megatron_prune.files.documents import read_bytes, shorten
from megatron_prune.text.encoder import tokenizer_errors
from megatron_prune.vocabulary.joins import Joins
from megatron_prune.vocabulary.tokenizer_file import KINDS, TokenizerFile, check_lengths

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}\r?")
PATTERN, SPECIAL_START = "PAT_STR", "SPECIAL_START_ID"
"""Constants of the Python file beside a rank file (Qwen 1): how a text is split, and the first id after the ranks."""


def is_rank_file(content: bytes) -> bool:
    """Whether a file is one of ranks, whatever it is called (Llama 3's is ``tokenizer.model``)."""
    return bool(_LINE.fullmatch(content.split(b"\n", 1)[0]))


@KINDS.register("tiktoken")
class RankFile(TokenizerFile):
    """Ranks that stay keep their order and are numbered anew; what comes after the ranks comes after them again."""

    rank = 1
    added: dict[int, str] = {}

    @classmethod
    def find(cls, folder: Path) -> TokenizerFile | None:
        for path in sorted({*folder.glob("*.tiktoken"), *folder.glob("t*.model")}):
            if is_rank_file(content := read_bytes(path)):
                return cls(path, content)
        return None

    def __init__(self, path: Path, content: bytes):
        self.path = path
        self._ids: dict[bytes, int] = {}
        wrong = []
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            if not _LINE.fullmatch(line):
                raise CheckpointError(
                    f"{path}, line {number} is damaged", got=shorten(line[:40]), needed="a token in base64 and its rank"
                )
            token, rank = line.split()
            try:
                piece = base64.b64decode(token)
            except ValueError as error:
                raise CheckpointError(f"{path}, line {number} is damaged", got=reason(error), needed="base64") from None
            if piece in self._ids:
                wrong.append(f"line {number}: the token {piece!r} stands twice")
            self._ids[piece] = int(rank)
        if sorted(self._ids.values()) != list(range(len(self._ids))):
            wrong.append(f"the ranks are not 0 to {len(self._ids) - 1}, each once")
        raise_all(CheckpointError, f"{path} contradicts itself", wrong)
        check_lengths(path, self._ids)
        self.pieces = {rank: piece for piece, rank in self._ids.items()}
        single = {byte: self._ids.get(bytes([byte])) for byte in range(256)}
        self.pinned = {rank: "byte" for rank in single.values() if rank is not None}
        self.missing_bytes = [byte for byte, rank in single.items() if rank is None]
        self.joins = Joins(
            ids=self._ids,
            rank=lambda left, right: self._ids.get(left + right),
            symbols=lambda piece: [piece[place : place + 1] for place in range(len(piece))],
        )
        self._constants = _constants(path.parent)

    def special_from(self, *, alone: bool) -> int | None:
        # above the ranks, where the code beside the file says so, or nothing else says what these rows are
        return len(self._ids) if alone or SPECIAL_START in self._constants else None

    @functools.cached_property
    def _runtime(self) -> Any:
        if PATTERN not in self._constants:
            raise CheckpointError(
                f"{self.path} does not say how a text is split into words",
                needed=f"a tokenizer.json beside it, or a Python file that says {PATTERN} (which is read, not run)",
            )
        import tiktoken

        name, pattern = self.path.stem, self._constants[PATTERN].value
        with tokenizer_errors(f"{self.path} is refused by tiktoken", CheckpointError):
            return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self._ids, special_tokens={})

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        runtime = self._runtime
        with tokenizer_errors(f"{self.path} cannot encode a text", CheckpointError):
            return runtime.encode_ordinary_batch(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces.get(number, b"") for number in ids).decode("utf-8", "replace")

    def splitter(self, kept: Mapping[int, int]) -> Callable[[int], list[int]]:
        return self.join_splitter(kept, self.pieces.__getitem__)

    def write(self, folder: Path, new_ids: Mapping[int, int]) -> None:
        stay = [rank for rank in sorted(self.pieces) if rank in new_ids]
        lines = [b"%s %d\n" % (base64.b64encode(self.pieces[rank]), new_ids[rank]) for rank in stay]
        (folder / self.path.name).write_bytes(b"".join(lines))
        start = self._constants.get(SPECIAL_START)
        if start:
            start.replace(folder, len(stay) + start.value - len(self._ids))


class _Constant:
    """A literal of a Python file that is read and not run."""

    def __init__(self, file: Path, node: ast.Constant):
        self.value, self._name = node.value, file.name
        self._place = (node.lineno, node.col_offset, node.end_col_offset)

    def replace(self, folder: Path, value: int) -> None:
        """Put another number in the file of the same name in ``folder``."""
        line, start, stop = self._place
        lines = (folder / self._name).read_bytes().splitlines(keepends=True)
        old = lines[line - 1]
        lines[line - 1] = old[:start] + str(value).encode() + old[stop:]
        (folder / self._name).write_bytes(b"".join(lines))


def _constants(folder: Path) -> dict[str, _Constant]:
    found: dict[str, _Constant] = {}
    for file in sorted(folder.glob("tokenization*.py")):
        try:
            tree = ast.parse(read_bytes(file))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            names = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            if names and isinstance(names[0], ast.Name) and isinstance(node.value, ast.Constant):
                kind = {PATTERN: str, SPECIAL_START: int}.get(names[0].id)
                if kind and isinstance(node.value.value, kind):
                    found[names[0].id] = _Constant(file, node.value)
    return found
