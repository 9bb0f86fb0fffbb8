"""Command-line options as frozen dataclasses: one field, one flag, one default, one help text.

A flag may be written with dashes or underscores (``--load-dir``, ``--load_dir``); unknown flags are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import types
import typing
from dataclasses import MISSING, Field, field, fields
from typing import Any, Callable, TypeVar

from megatron_prune.errors import InputError

Options = TypeVar("Options")


def option(help: str, default: Any = MISSING, *, choices: list[str] | None = None, least: float | None = None) -> Any:
    """A dataclass field that becomes a flag; required when it has no default.

    Args:
        least: the lowest number that is taken.
    """
    metadata = {"help": help, "choices": choices, "least": least}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def integers(text: str) -> tuple[int, ...]:
    """``"7,13"`` → ``(7, 13)``; an empty text is an empty tuple."""
    try:
        return tuple(whole(part) for part in text.replace(" ", "").split(",") if part)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 7,13") from None


LARGEST = (1 << 63) - 1
"""Of whole numbers: what torch, numpy and files take."""


def whole(text: str) -> int:
    """A whole number that fits 64 bits."""
    if not re.fullmatch(r"\s*[+-]?[0-9][0-9_]{0,24}\s*", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number")
    number = int(text)
    if abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"{number} is larger than {LARGEST}")
    return number


def finite(text: str) -> float:
    """A number; neither NaN nor infinity is one."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number")
    return number


def _at_least(read: Callable[[str], Any], least: float | None) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        number = read(text)
        if number < least:
            needed = "a positive number" if least == 1 else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"{number} is not {needed}")
        return number

    return read if least is None else checked


def is_utf8(name: str) -> bool:
    """Whether a name that the operating system gave is text."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def nonempty(given: str) -> str:
    """A text that says something: a variable that was never set is not taken for a path; what files are to name is UTF-8."""
    if not given.strip():
        raise argparse.ArgumentTypeError("nothing is given: it is empty")
    if not is_utf8(given):  # JSON, safetensors and tokenizers cannot say such a name
        raise argparse.ArgumentTypeError(f"{given!r} is not UTF-8: rename it, or name a link to it")
    if "\0" in given:
        raise argparse.ArgumentTypeError(f"{given!r} holds a NUL")
    return given


class Parser(argparse.ArgumentParser):
    """One that takes whole flags alone, and refuses ``--flag=--``, which argparse reads as a list of no values."""

    def __init__(self, *, prog: str, description: str | None):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        """The values of all flags; a bad one ends the process with code 2."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            if re.fullmatch(r"--?[^=]+=--", word):
                self.error(f"argument {word.removesuffix('=--')}: '--' is no value")
        return super().parse_args(words)


def truth(text: str) -> bool:
    """``true`` or ``false``."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither true nor false")
    return text == "true"


def read_value(item: Field, annotation: type, text: str) -> Any:
    """The value of a dataclass field that is written as one word, outside of a command line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        value = _at_least({**_TYPES, "bool": truth}[annotation.__name__], item.metadata["least"])(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{text[:40]!r} is none of " + ", ".join(map(str, choices)))
    return value


_TYPES = {"int": whole, "float": finite, "str": nonempty, "tuple": integers}
_METAVARS = {"int": "N", "float": "X", "tuple": "N,N"}


def add_options(parser: argparse.ArgumentParser, kind: type, chosen: list[Field] | None = None) -> None:
    """Give ``parser`` a flag for every field of a dataclass (or for the ``chosen`` ones)."""
    hints = typing.get_type_hints(kind)
    for item in fields(kind) if chosen is None else chosen:
        annotation, optional = hints[item.name], False
        if isinstance(annotation, types.UnionType):
            annotation, optional = next(part for part in typing.get_args(annotation) if part is not type(None)), True
        name = (typing.get_origin(annotation) or annotation).__name__
        spellings = _spellings(item)
        common = {"dest": item.name, "help": item.metadata["help"] + _default_text(item)}
        if name == "bool" and optional:  # --this or --no-this, and None where nothing is said
            parser.add_argument(*spellings, action=argparse.BooleanOptionalAction, default=item.default, **common)
        elif name == "bool":
            parser.add_argument(*spellings, action="store_true", **common)
        elif annotation == tuple[str, ...]:
            parser.add_argument(*spellings, nargs="+", type=nonempty, default=item.default, metavar=item.name.upper(), **common)
        else:
            parser.add_argument(
                *spellings,
                type=_at_least(_TYPES[name], item.metadata["least"]),
                choices=item.metadata["choices"],
                required=item.default is MISSING,
                default=None if item.default is MISSING else item.default,
                metavar=None if item.metadata["choices"] else _METAVARS.get(name, item.name.upper()),
                **common,
            )


def _spellings(item: Field) -> list[str]:
    return list(dict.fromkeys([f"--{item.name.replace('_', '-')}", f"--{item.name}"]))


def _default_text(item: Field) -> str:
    if any(item.default is empty for empty in (MISSING, None, False, ())):
        return ""
    shown = " ".join(item.default) if isinstance(item.default, tuple) and isinstance(item.default[0], str) else item.default
    return f" (default: {shown})"


def parse(kind: type[Options], argv: list[str], *, prog: str, description: str) -> Options:
    """Read ``argv`` into ``kind``; argparse exits with code 2 on a bad flag."""
    parser = Parser(prog=prog, description=description)
    add_options(parser, kind)
    return kind(**vars(parser.parse_args(argv)))


def require_positive(options: Any, *names: str) -> None:
    """Refuse options that are given and not positive.

    Raises:
        InputError: naming the flag.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}", got=value, needed="a positive number")


def given(options: Any) -> dict[str, Any]:
    """Options that differ from their defaults: what a recipe records."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if getattr(options, f.name) != f.default}
