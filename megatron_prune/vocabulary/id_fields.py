"""Token ids in the JSON files of a model directory: found, and numbered anew.

Ids stand in ``config.json`` and ``generation_config.json`` (also of an image or audio part, nested), in
``tokenizer_config.json`` and ``added_tokens.json``. Chat templates name tokens by their text.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from megatron_prune.errors import CheckpointError, raise_all, reason
from megatron_prune.files.documents import read_json, shorten

_FILES = ("config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json", "processor_config.json")
_TOKENIZER_CONFIG, _ADDED, _SPECIAL_MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_ID = re.compile(
    r"(.+_)?token_(ids?|index|indices)|(begin_)?suppress_tokens|(bad|force|stop)_words_ids|(lang|task)_to_id|"
    r"(bos|eos|pad|unk|cls|sep|mask)_(id|idx)"
)
"""Keys whose numbers are ids, however deep their lists."""

_POSITIONED = "forced_decoder_ids"
"""[position, id] pairs."""

_BIAS = "sequence_bias"
"""[[ids], bias] pairs."""

Renumber = Callable[[str, int], int]
"""(where, old id) → new id."""


def renumbered(data: Any, renumber: Renumber, where: str = "") -> Any:
    """A copy of a JSON value with every token id changed. A negative id means that there is none, and stays."""
    if isinstance(data, list):
        return [renumbered(item, renumber, where) for item in data]
    if not isinstance(data, dict):
        return data
    return {key: _value(key, value, renumber, f"{where}{key}") for key, value in data.items()}


def _value(key: str, value: Any, renumber: Renumber, where: str) -> Any:
    if _ID.fullmatch(key):
        return _all_numbers(value, renumber, where)
    if key == _POSITIONED and isinstance(value, list):
        return [[place, _all_numbers(token, renumber, where)] for place, token in value]
    if key == _BIAS and isinstance(value, list):
        return [[_all_numbers(tokens, renumber, where), bias] for tokens, bias in value]
    return renumbered(value, renumber, where + ": ")


def _all_numbers(value: Any, renumber: Renumber, where: str) -> Any:
    if isinstance(value, list):
        return [_all_numbers(item, renumber, where) for item in value]
    if isinstance(value, dict):
        return {key: _all_numbers(item, renumber, where) for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return renumber(where, value)
    return value


def named_ids(folder: Path) -> dict[int, str]:
    """Every id that a file of a directory names → where.

    Raises:
        CheckpointError: if one of the files is damaged.
    """
    found: dict[int, str] = {}

    def note(where: str, token: int) -> int:
        found.setdefault(token, where)
        return token

    _each_file(folder, note)
    return found


def added_tokens(folder: Path) -> dict[int, str]:
    """id → text of the tokens that the tokenizer's own JSON files add beside its table.

    Raises:
        CheckpointError: if one of the files is damaged.
    """
    with _readable(folder / _TOKENIZER_CONFIG):
        decoder = (_load(folder / _TOKENIZER_CONFIG) or {}).get("added_tokens_decoder") or {}
        found = {int(number): _text(token["content"]) for number, token in decoder.items()}
    with _readable(folder / _ADDED):
        return found | {_whole(number): text for text, number in (_load(folder / _ADDED) or {}).items()}


def special_texts(folder: Path) -> dict[str, str]:
    """``bos_token`` … → text, as the tokenizer's JSON files say.

    Raises:
        CheckpointError: if one of the files is damaged.
    """
    found: dict[str, str] = {}
    for name in (_SPECIAL_MAP, _TOKENIZER_CONFIG):
        with _readable(folder / name):
            held = _load(folder / name) or {}
            said = {key: held[key] for key in _SPECIAL if held.get(key)}
            found |= {key: _text(value["content"] if isinstance(value, dict) else value) for key, value in said.items()}
    return found


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Say of what is not as it should be which file it is in."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged", got=reason(error), do="fetch it again") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shorten(value)} is no text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{shorten(value)} is no id")
    return value


def renumber_files(source: Path, target: Path, new_ids: Mapping[int, int], vocab_size: int) -> None:
    """Write those files of ``source`` that hold ids or the size of the vocabulary into ``target``.

    Raises:
        CheckpointError: naming ids that have no new one.
    """
    wrong: list[str] = []

    def renumber(where: str, token: int) -> int:
        if token not in new_ids:
            wrong.append(f"{where}: {token}")
        return new_ids.get(token, token)

    changed = _each_file(source, renumber)
    raise_all(CheckpointError, f"{source} names tokens that there are not", wrong, do="correct these ids")
    for name, data in changed.items():
        for part in (data, data.get("text_config") or {}) if name == "config.json" else ():
            if "vocab_size" in part:
                part["vocab_size"] = vocab_size
        (target / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def renumber_config(data: dict[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """``config.json`` as :func:`renumber_files` writes it, but for the size of the vocabulary."""
    return renumbered(data, lambda where, token: new_ids[token])


def _each_file(folder: Path, renumber: Renumber) -> dict[str, Any]:
    """File name → content with changed ids, of all files there are."""
    found = {}
    for name in _FILES:
        data = _load(folder / name)
        if data is not None:
            with _readable(folder / name):
                found[name] = renumbered(data, renumber, f"{name}: ")
    config = _load(folder / _TOKENIZER_CONFIG)
    if config is not None:
        with _readable(folder / _TOKENIZER_CONFIG):
            found[_TOKENIZER_CONFIG] = config = renumbered(config, renumber, f"{_TOKENIZER_CONFIG}: ")
            decoder = config.get("added_tokens_decoder")
            if decoder:
                where = f"{_TOKENIZER_CONFIG}: added_tokens_decoder"
                pairs = [(renumber(where, int(number)), copy.deepcopy(token)) for number, token in decoder.items()]
                config["added_tokens_decoder"] = {str(number): token for number, token in pairs}
    added = _load(folder / _ADDED)
    if added is not None:
        with _readable(folder / _ADDED):
            found[_ADDED] = {text: renumber(_ADDED, _whole(number)) for text, number in added.items()}
    return found


def _load(file: Path) -> dict[str, Any] | None:
    return read_json(file, do="fetch it again") if file.exists() else None
