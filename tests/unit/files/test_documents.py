"""Documents from outside: every way in which a file can be wrong is a message with the file, the field, got and needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import CheckpointError, InputError, PlanError
from megatron_prune.files.documents import (
    STRICT,
    open_regular,
    parse_json,
    parse_versioned,
    read_bytes,
    read_json,
    read_text,
    shorten,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    __pydantic_config__ = STRICT
    size: int
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    __pydantic_config__ = STRICT
    name: str
    inner: Inner
    several: list[int] | None = None

    def __post_init__(self):
        if self.name == "own":
            raise PlanError("an own check")


def test_a_document_becomes_its_description():
    text = '{"name": "a", "inner": {"size": 3, "share": 2}, "several": [1, 2]}'
    assert parse_json(text, Outer, "x") == Outer(name="a", inner=Inner(size=3, share=2.0), several=[1, 2])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a", "inner": {"size": "3"}}', "f.json: inner.size\n  got: '3'"),
        ('{"name": "a", "inner": {"size": 3.0}}', "f.json: inner.size"),
        ('{"name": "a", "inner": {"size": true}}', "f.json: inner.size\n  got: True"),
        ('{"name": "a", "inner": {"size": 3, "share": NaN}}', "f.json: inner.share\n  got: nan"),
        ('{"name": "a", "inner": {"size": 3, "share": 1e999}}', "f.json: inner.share"),
        ('{"name": "a", "inner": {"size": 3, "new": 1}}', "f.json: inner.new"),
        ('{"name": "a"}', "f.json: inner\n  needed: a value: the field is missing"),
        ('{"name": null, "inner": 3}', "f.json: name\n  got: None\n  needed: a valid string; 1 more field"),
        ("[1]", "f.json\n  got: [1]"),
        ("nonsense", "f.json is not JSON"),
        ("", "f.json is not JSON"),
        ("[" * 200_000, "f.json is not JSON"),
        ('{"a":' * 200_000, "f.json is not JSON"),
    ],
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(CheckpointError) as found:
        parse_json(text, Outer, "f.json")
    assert said in str(found.value)


def test_a_field_twice_is_refused_where_it_may_stand_once():
    text = '{"name": "a", "inner": {"size": 3, "size": 4}}'
    assert parse_json(text, Outer, "f.json").inner.size == 4
    with pytest.raises(CheckpointError, match="f.json\n  got: the field 'size' twice\n  needed: every field once"):
        parse_json(text, Outer, "f.json", once=True)


@pytest.mark.parametrize("version, update", [("null", False), ("0", False), ('"2"', False), ("3", True)])
def test_a_version_is_refused_and_only_a_later_one_is_an_update_away(version, update):
    text = f'{{"format": "us", "version": {version}, "name": "a", "inner": {{"size": 3}}}}'
    with pytest.raises(CheckpointError, match="needed: version 1 to 2") as error:
        parse_versioned(text, Outer, "f.json", format="us", version=2, do="write it again")
    assert ("update megatron-prune" in str(error.value)) == update and ("write it again" in str(error.value)) != update


def test_an_own_check_of_a_description_speaks_for_itself():
    with pytest.raises(PlanError, match="an own check"):
        parse_json('{"name": "own", "inner": {"size": 3}}', Outer, "f.json")


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "f.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8 text\n  got: byte 0xff at 7"):
        read_text(file)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(file)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "a pipe or a device"), (".", "a directory"), ("none", "is missing"), ("a\0b", "cannot be read")):
        for read in (open_regular, read_bytes, read_text, read_json):
            with pytest.raises(CheckpointError, match=said):
                read(tmp_path / name)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_bytes(Path("/dev/zero"))


def test_a_document_has_a_limit(tmp_path):
    file = tmp_path / "long"
    file.write_bytes(b"12345")
    assert read_bytes(file, limit=5) == b"12345"
    with pytest.raises(InputError, match="got: 5 bytes\n  needed: at most 4"):
        read_bytes(file, limit=4)


@pytest.mark.parametrize(
    "value", ["\x1b[31mred\nline", 10**5000, [[]] * 9999, "ü" * 999], ids=["codes", "digits", "list", "letters"]
)
def test_what_a_message_shows_is_short_and_plain(value: Any):
    text = shorten(value)
    assert len(text) <= 80 and text.isprintable()
