"""``tokenizer.model`` of SentencePiece: BPE and unigram (Kudo & Richardson 2018, arXiv 1808.06226)."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from megatron_prune.errors import CheckpointError, reason
from megatron_prune.files.documents import read_bytes, shorten
from megatron_prune.text.encoder import tokenizer_errors
from megatron_prune.vocabulary.joins import Joins
from megatron_prune.vocabulary.kinds.tiktoken import is_rank_file
from megatron_prune.vocabulary.tokenizer_file import (
    KINDS,
    TokenizerFile,
    check_byte_pieces,
    check_lengths,
    lowest_scored,
    pinned_characters,
    unigram_splitter,
)

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WHY = {
    _UNKNOWN: "unknown token",
    _CONTROL: "control piece",
    _USER_DEFINED: "user-defined piece",
    _UNUSED: "unused piece",
    _BYTE: "byte",
}
_UNIGRAM, _BPE = 1, 2


@KINDS.register("sentencepiece")
class SentencePiece(TokenizerFile):
    """Entries that stay are copied as they are, in their order: a score is no function of the id."""

    rank = 2
    added: dict[int, str] = {}
    missing_bytes: list[int] = []

    @classmethod
    def find(cls, folder: Path) -> TokenizerFile | None:
        for name in FILES:
            path = folder / name
            if path.is_file() and not is_rank_file(content := read_bytes(path)):
                return cls(path, content)
        return None

    def __init__(self, path: Path, content: bytes):
        from google.protobuf.message import DecodeError
        from google.protobuf.unknown_fields import UnknownFieldSet
        from sentencepiece import sentencepiece_model_pb2

        self.path, self._content = path, content
        try:
            self._proto = sentencepiece_model_pb2.ModelProto.FromString(content)
        except DecodeError as error:
            raise CheckpointError(f"{path} is neither a SentencePiece model nor a rank file", got=reason(error)) from None
        entries, trainer = self._proto.pieces, self._proto.trainer_spec
        if not entries:
            raise CheckpointError(f"{path} holds no pieces")
        odd = [entry.piece for entry in entries if len(UnknownFieldSet(entry))]  # a type that this version does not know
        if odd:
            raise CheckpointError(f"{path} holds pieces of an unknown type", got=", ".join(map(repr, odd[:5])))
        if trainer.model_type not in (_UNIGRAM, _BPE):
            raise CheckpointError(f"{path} is a word or character model", needed="BPE or unigram: others cannot be trimmed")
        ids = {entry.piece: number for number, entry in enumerate(entries)}
        if len(ids) < len(entries):
            raise CheckpointError(f"{path} lists a piece twice")
        check_lengths(path, ids)
        unsound = [entry.piece for entry in entries if not math.isfinite(entry.score)]
        if unsound:
            raise CheckpointError(f"{path}: scores that are no numbers", got=shorten(unsound), do="fetch it again")
        self.pieces = {number: piece.encode("utf-8") for piece, number in ids.items()}
        self._normal = {entry.piece: n for n, entry in enumerate(entries) if entry.type in (_NORMAL, _UNUSED)}
        self.pinned = pinned_characters(self._normal, trainer.byte_fallback)
        self.pinned |= {number: _WHY[entry.type] for number, entry in enumerate(entries) if entry.type in _WHY}
        if trainer.byte_fallback:
            check_byte_pieces(path, ids)
        if trainer.model_type == _BPE:
            # joined in the order of the joined piece's score; of equals the leftmost, as everywhere
            ranks = {piece: -entries[number].score for piece, number in self._normal.items()}
            self.joins = Joins(ids=ids, rank=lambda left, right: ranks.get(left + right), symbols=list)
        else:
            self.joins = None
            if self._normal:
                self.pinned[lowest_scored((n, entries[n].score) for n in self._normal.values())] = "lowest score"

    @functools.cached_property
    def _runtime(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        with tokenizer_errors(f"{self.path} is refused by sentencepiece", CheckpointError):
            return SentencePieceProcessor(model_proto=self._content)

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        runtime = self._runtime
        with tokenizer_errors(f"{self.path} cannot encode a text", CheckpointError):
            return runtime.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        runtime = self._runtime
        with tokenizer_errors(f"{self.path} cannot say the text of tokens", CheckpointError):
            return runtime.decode([number for number in ids if number < len(self.pieces)])

    def splitter(self, kept: Mapping[int, int]) -> Callable[[int], list[int]]:
        entries = self._proto.pieces
        if self.joins:
            return self.join_splitter(kept, lambda token: entries[token].piece)
        unk = next((number for number, entry in enumerate(entries) if entry.type == _UNKNOWN), None)
        scored = [(entry.piece, entry.score) for entry in entries]
        return unigram_splitter(scored, unk, self._proto.trainer_spec.byte_fallback, kept)

    def write(self, folder: Path, new_ids: Mapping[int, int]) -> None:
        proto = type(self._proto).FromString(self._content)
        entries = [entry for number, entry in enumerate(self._proto.pieces) if number in new_ids]
        del proto.pieces[:]
        proto.pieces.extend(entries)
        trainer = proto.trainer_spec
        trainer.vocab_size = len(entries)
        for field in ("unk_id", "bos_id", "eos_id", "pad_id"):
            old = getattr(trainer, field)
            if trainer.HasField(field) and 0 <= old < len(self.pieces):
                setattr(trainer, field, new_ids[old])
        proto.DiscardUnknownFields()  # the self-test of old versions: its samples may encode to tokens that are gone
        (folder / self.path.name).write_bytes(proto.SerializeToString())
