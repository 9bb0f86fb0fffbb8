"""``tokenizer.json`` of Hugging Face's tokenizers: BPE of bytes or of characters, and unigram."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Mapping, Sequence

from pydantic import Field
from typing_extensions import Required, TypedDict

from megatron_prune.errors import CheckpointError, raise_all, reason
from megatron_prune.files.documents import parse_json, read_bytes
from megatron_prune.text.encoder import tokenizer_errors
from megatron_prune.vocabulary.joins import Joins
from megatron_prune.vocabulary.tokenizer_file import (
    KINDS,
    TokenizerFile,
    check_byte_pieces,
    check_lengths,
    lowest_scored,
    pinned_characters,
    unigram_splitter,
)

FILE = "tokenizer.json"

Id = Annotated[int, Field(ge=0)]
Text = str | None
Node = dict[str, Any] | None


class _AddedToken(TypedDict):
    __pydantic_config__ = {"extra": "ignore"}
    id: Id
    content: str


class _Padding(TypedDict):
    __pydantic_config__ = {"extra": "ignore"}
    pad_id: Id


class _Model(TypedDict, total=False):
    __pydantic_config__ = {"extra": "ignore", "allow_inf_nan": False}
    type: Text
    vocab: Required[dict[str, Id] | list[tuple[str, float]]]
    merges: list[str | tuple[str, str]]
    byte_fallback: bool | None
    dropout: float | None
    continuing_subword_prefix: Text
    end_of_word_suffix: Text
    unk_token: Text
    unk_id: Id | None


class _File(TypedDict, total=False):
    """What is read of the file; the rest is carried as it stands."""

    __pydantic_config__ = {"extra": "ignore"}
    model: Required[_Model]
    added_tokens: list[_AddedToken] | None
    normalizer: Node
    pre_tokenizer: Node
    post_processor: Node
    decoder: Node
    padding: _Padding | None


@KINDS.register("tokenizer_json")
class TokenizerJson(TokenizerFile):
    """Merges are filtered, everything but ids is carried as it stands."""

    rank = 0

    @classmethod
    def find(cls, folder: Path) -> TokenizerFile | None:
        path = folder / FILE
        return cls(path, read_bytes(path)) if path.is_file() else None

    def __init__(self, path: Path, content: bytes):
        self.path, self._content = path, content
        parse_json(content, _File, path, do="fetch it again")
        try:
            self._data = json.loads(content)
            self._model = self._data["model"]
            kind = self._model.get("type") or ("BPE" if "merges" in self._model else None)
            if kind not in ("BPE", "Unigram"):
                raise CheckpointError(f"{path}: model type {kind!r}", needed="BPE or Unigram: others cannot be trimmed")
            self._unigram = kind == "Unigram"
            self._fallback = bool(self._model.get("byte_fallback"))
            if isinstance(self._model["vocab"], list) != (kind == "Unigram"):
                raise CheckpointError(
                    f"{path}: model.vocab", needed="a list of pieces" if kind == "Unigram" else "pieces and ids"
                )
            if not self._model["vocab"]:
                raise CheckpointError(f"{path} has an empty vocabulary")
            self.added = {token["id"]: token["content"] for token in self._data.get("added_tokens") or ()}
            self._ids = self._read_unigram() if self._unigram else self._read_bpe()
            self._check_added()
            self.pinned = self._pin()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is damaged", got=reason(error), do="fetch it again") from None
        self._runtime = None

    def _read_unigram(self) -> dict[str, int]:
        self._scored = [(piece, float(score)) for piece, score in self._model["vocab"]]
        ids = {piece: number for number, (piece, _) in enumerate(self._scored)}
        self.pieces = {number: piece.encode("utf-8", "surrogatepass") for piece, number in ids.items()}
        self.joins, self.missing_bytes, self._bytes = None, [], {}
        return ids

    def _read_bpe(self) -> dict[str, int]:
        ids = dict(self._model["vocab"])
        check_lengths(self.path, ids)
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self._model.get(key):
                raise CheckpointError(f"{self.path}: {key} {self._model[key]!r}", needed="none: such BPE cannot be trimmed")
        rules: dict[tuple[str, str], int] = {}
        wrong = []
        for rank, merge in enumerate(self._model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            wrong += [f"merge {rank}: {part!r}" for part in (left, right, left + right) if part not in ids]
            rules.setdefault((left, right), rank)
        raise_all(CheckpointError, f"{self.path}: merges do not fit the vocabulary, which lacks", wrong)
        self._byte_level = any(node.get("type") == "ByteLevel" for node in _nodes(self._data))
        self._bytes = {character: byte for byte, character in byte_alphabet().items()} if self._byte_level else {}
        self.pieces = {number: self._raw(piece) for piece, number in ids.items()}
        self.missing_bytes = [b for c, b in sorted(self._bytes.items(), key=lambda pair: pair[1]) if c not in ids]
        rank_of = lambda left, right: rules.get((left, right))
        self.joins = Joins(ids=ids, rank=rank_of, symbols=list)
        self._spelling = {number: piece for piece, number in ids.items()}
        return ids

    def _raw(self, piece: str) -> bytes:
        if self._byte_level and all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece)
        return piece.encode("utf-8", "surrogatepass")

    def _check_added(self) -> None:
        """An added token may stand in the vocabulary too, with the same id; no two tokens have one id."""
        spelled = {number: piece for piece, number in self._ids.items()}
        wrong = []
        for number, text in self.added.items():
            if self._ids.get(text, number) != number:
                wrong.append(f"{text!r} is {number} among the added tokens and {self._ids[text]} in the vocabulary")
            elif spelled.get(number, text) != text:
                wrong.append(f"{number} is {text!r} among the added tokens and {spelled[number]!r} in the vocabulary")
        if len(spelled) < len(self._ids):
            wrong.append("two tokens of the vocabulary have one id")
        raise_all(CheckpointError, f"{self.path} contradicts itself", wrong)

    def _pin(self) -> dict[int, str]:
        pinned: dict[int, str] = {}
        ordinary = {piece: number for piece, number in self._ids.items() if number not in self.added}
        if self._bytes:
            pinned |= {self._ids[character]: "byte" for character in self._bytes if character in self._ids}
        else:
            says_bytes = any(node.get("type") == "ByteFallback" for node in _nodes(self._data))
            pinned |= pinned_characters(ordinary, self._fallback and says_bytes)
        if self._fallback:
            pinned |= check_byte_pieces(self.path, self._ids)
        if self._unigram:
            unk = self._model.get("unk_id")
            pinned |= {} if unk is None else {unk: "unknown token"}
            pinned[lowest_scored((number, score) for number, (_, score) in enumerate(self._scored))] = "lowest score"
        elif self._model.get("unk_token") in self._ids:
            pinned[self._ids[self._model["unk_token"]]] = "unknown token"
        for number in _processor_ids(self._data.get("post_processor")):
            pinned[number] = "post-processor"
        if self._data.get("padding"):
            pinned[self._data["padding"]["pad_id"]] = "padding"
        return pinned | {number: "added token" for number in self.added}

    def runtime(self) -> Any:
        """The ``tokenizers.Tokenizer``, without truncation and padding.

        Raises:
            CheckpointError: if it refuses the file.
        """
        if self._runtime is None:
            from tokenizers import Tokenizer

            with tokenizer_errors(f"{self.path} is refused by tokenizers", CheckpointError):
                text = self._content.decode("utf-8")
                if self._model.get("dropout"):  # the same tokens every time
                    text = json.dumps({**self._data, "model": {**self._model, "dropout": None}})
                self._runtime = Tokenizer.from_str(text)
                self._runtime.no_truncation()
                self._runtime.no_padding()
        return self._runtime

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        runtime = self.runtime()
        with tokenizer_errors(f"{self.path} cannot encode a text", CheckpointError):  # such as a character without unk_id
            return [found.ids for found in runtime.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        runtime = self.runtime()
        with tokenizer_errors(f"{self.path} cannot say the text of tokens", CheckpointError):
            return runtime.decode(list(ids), skip_special_tokens=True)

    def splitter(self, kept: Mapping[int, int]) -> Callable[[int], list[int]]:
        if self._unigram:
            return unigram_splitter(self._scored, self._model.get("unk_id"), self._fallback, kept)
        return self.join_splitter(kept, self._spelling.__getitem__)

    def write(self, folder: Path, new_ids: Mapping[int, int]) -> None:
        data = {key: value for key, value in self._data.items() if key != "model"}
        data = copy.deepcopy(data) | {"model": dict(self._model)}
        model = data["model"]
        if self._unigram:
            model["vocab"] = [entry for number, entry in enumerate(self._model["vocab"]) if number in new_ids]
            model["unk_id"] = None if model.get("unk_id") is None else new_ids[model["unk_id"]]
        else:
            kept = {piece: new_ids[number] for piece, number in self._ids.items() if number in new_ids}
            model["vocab"] = dict(sorted(kept.items(), key=lambda pair: pair[1]))
            model["merges"] = [merge for merge in self._model["merges"] if self._stays(merge, kept)]
        for token in data.get("added_tokens") or ():
            token["id"] = new_ids[token["id"]]
        _renumber_processor(data.get("post_processor"), new_ids)
        if data.get("padding"):
            data["padding"]["pad_id"] = new_ids[data["padding"]["pad_id"]]
        text = json.dumps({key: data[key] for key in self._data}, ensure_ascii=False, indent=2)
        (folder / FILE).write_text(text, encoding="utf-8", errors="surrogatepass")

    def _stays(self, merge: str | list[str], kept: Mapping[str, int]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return left in kept and right in kept and left + right in kept


def byte_alphabet() -> dict[int, str]:
    """Byte → the character that stands for it in byte-level vocabularies (GPT-2, Radford et al. 2019: printable ones for
    themselves, the others for the characters from U+0100 on)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def _nodes(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every normalizer, pre-tokenizer and decoder, those inside sequences too."""
    waiting = [data.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        node = waiting.pop()
        if node:
            yield node
            waiting += [*node.get("normalizers", ()), *node.get("pretokenizers", ()), *node.get("decoders", ())]


def _processor_ids(node: dict[str, Any] | None) -> Iterator[int]:
    """Ids that a post-processor puts around a text."""
    kind = node and node.get("type")
    if kind == "Sequence":
        for inner in node["processors"]:
            yield from _processor_ids(inner)
    elif kind == "TemplateProcessing":
        for token in node["special_tokens"].values():
            yield from token["ids"]
    elif kind in ("RobertaProcessing", "BertProcessing"):
        yield from (node[key][1] for key in ("sep", "cls"))
    elif kind not in (None, "ByteLevel"):
        raise ValueError(f"post-processor {kind!r}")


def _renumber_processor(node: dict[str, Any] | None, new_ids: Mapping[int, int]) -> None:
    kind = node and node.get("type")
    if kind == "Sequence":
        for inner in node["processors"]:
            _renumber_processor(inner, new_ids)
    elif kind == "TemplateProcessing":
        for token in node["special_tokens"].values():
            token["ids"] = [new_ids[number] for number in token["ids"]]
    elif kind in ("RobertaProcessing", "BertProcessing"):
        for key in ("sep", "cls"):
            node[key] = [node[key][0], new_ids[node[key][1]]]
