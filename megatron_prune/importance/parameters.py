"""Parameters behind a name, as in ``obs:damping=0.1``: read into a frozen dataclass, and written again."""

from __future__ import annotations

import difflib
import typing
from dataclasses import Field, fields
from typing import Any, TypeVar

from megatron_prune.config import given, read_value
from megatron_prune.errors import InputError

Parameters = TypeVar("Parameters")


def written(name: str, parameters: Any) -> str:
    """A name with those of its parameters that are not at their defaults, in the order of their declaration."""
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in given(parameters).items()]
    return f"{name}:{','.join(words)}" if words else name


def split(text: str) -> tuple[str, list[str]]:
    """A name, and the words behind its colon.

    Raises:
        InputError: if words follow without a colon, or none follows one.
    """
    name, colon, rest = text.partition(":")
    if "=" in name:
        word = name.rpartition(",")[2]
        raise InputError(
            f"{text!r}: no name stands before {word}", needed="a name, a colon and its parameters, as in obs:damping=0.1"
        )
    if colon and not rest:
        raise InputError(f"{text!r} names no parameter after its colon", do=f"leave the colon out: {name}")
    return name, rest.split(",") if colon else []


def separate(text: str) -> list[str]:
    """``"activation,obs:damping=0.1"`` → its names; a word with ``=`` and no colon before it belongs to the name before."""
    found: list[str] = []
    for word in filter(None, text.split(",")):
        if found and ":" in found[-1] and "=" in word.partition(":")[0]:
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def read(kind: type[Parameters], words: list[str], owner: str) -> Parameters:
    """Parameters from words such as ``damping=0.1``.

    Args:
        kind: a dataclass of :func:`megatron_prune.config.option` fields.
        owner: whose they are, for messages (``"metric obs"``).

    Raises:
        InputError: if a parameter is not known (naming the nearest), given twice, or of a value that does not fit it.
    """
    known, hints, values = {item.name: item for item in fields(kind)}, typing.get_type_hints(kind), {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in known:
            raise _unknown(name, known, owner)
        if not equals:
            raise InputError(f"{owner}: {name} has no value", needed=f"{name}=…, {_described(known[name])}")
        if name in values:
            raise InputError(f"{owner}: {name} is given twice", do="give it once")
        try:
            values[name] = read_value(known[name], hints[name], text)
        except ValueError as error:
            raise InputError(f"{owner}: {name}: {error}", needed=_described(known[name])) from None
    return kind(**values)


def _unknown(name: str, known: dict[str, Field], owner: str) -> InputError:
    if not known:
        return InputError(f"{owner} takes no parameters", got=name, do="leave out the colon and what follows it")
    near = difflib.get_close_matches(name, known, n=1)
    return InputError(
        f"{owner} has no parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        needed="\n    ".join(["one of", *(f"{item.name}: {_described(item)}" for item in known.values())]),
    )


def _described(item: Field) -> str:
    return f"{item.metadata['help']} (default: {item.default})"
