"""A command line read into the options of a verb.

A flag may be written with dashes or underscores (``--seq-length``, ``--seq_length``); unknown flags are refused with the nearest.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
import typing
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from megatron_prune.config import GROUPS, check_there, flag, nearest, nonempty, reader
from megatron_prune.errors import InputError

Options = TypeVar("Options")
ALONE = "__alone"
"""Behind the name, in a namespace, of a value that stands without its flag."""


class Parser(argparse.ArgumentParser):
    """One that takes whole flags alone, and says of a bad one what it is.

    Raises, where argparse would leave the process:
        InputError: naming every word that is not known, with the flag that is nearest.
    """

    def __init__(self, *, prog: str, description: str | None = None, epilog: str | None = None):
        super().__init__(
            prog=prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=_Help, add_help=False
        )
        self._negative_number_matcher = re.compile(r"-\.?[0-9]")  # also -1GiB, which is a value: what is wrong with it is said
        self.needed: list[argparse.Action] = []
        self.single: set[str] = set()  # options that name one thing, not words with commas

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        """The values of all flags."""
        words = [self.spelled(word) for word in (sys.argv[1:] if args is None else args)]
        for word in words:  # argparse reads it as a list of no values
            if re.fullmatch(r"--?[^=]+=--", word):
                self.error(f"{word.removesuffix('=--')}: '--' is no value")
        namespace, unknown = self.parse_known_args(words)
        missing = [action.option_strings[0] for action in self.needed if getattr(namespace, action.dest) is None]
        missing = [name for name in missing if getattr(namespace, name[2:] + ALONE, None) is None]
        if unknown:
            self._refuse(unknown, missing)
        self._merge_alone(namespace)
        if missing and not getattr(namespace, "print_config", False):
            raise InputError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed", do=self._where())
        return namespace

    def _refuse(self, unknown: list[str], missing: list[str]) -> typing.NoReturn:
        """Say of flags that there are not what is near; of words without a flag, where all flags are good, what is missing."""
        if said := [self.unknown(word) for word in unknown if word.startswith("-")]:
            raise InputError("\n  and: ".join(said), do=self._where())
        stray = f"{' and '.join(map(repr, unknown))} {'stands' if len(unknown) == 1 else 'stand'} without a flag"
        raise InputError(stray, needed=" and ".join(missing) or None, do=self._where())

    def _merge_alone(self, namespace: argparse.Namespace) -> None:
        """Put values that stand without their flag where those with it are."""
        for name in [name for name in vars(namespace) if name.endswith(ALONE)]:
            alone, dest = getattr(namespace, name), name.removesuffix(ALONE)
            delattr(namespace, name)
            if alone is None:
                continue
            if getattr(namespace, dest) not in (None, self.get_default(dest)):
                raise InputError(
                    f"{flag(dest)} {getattr(namespace, dest)} and {alone}", needed="one of the two", do=self._where()
                )
            setattr(namespace, dest, alone)

    def error(self, message: str) -> typing.NoReturn:
        """A bad value: argparse says ``argument --flag: …``."""
        said = re.sub(r"^argument (-[^:]*?)(/[^:]*)?: ", r"\1: ", message)
        raise InputError(said, do=self._where())

    def spelled(self, word: str) -> str:
        """A flag as it was declared, whether written with dashes or underscores."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        dashed = "--" + name[2:].replace("_", "-")
        return dashed + equals + value if dashed in self._option_string_actions else word

    def unknown(self, word: str) -> str:
        """What is wrong with a flag that there is not, with the one that is nearest."""
        name = word.partition("=")[0]
        known = {
            spelling[2:].replace("-", "_"): spelling if spelling.startswith("--no-") else _long(action)
            for spelling, action in self._option_string_actions.items()
            if spelling.startswith("--")
        }
        near = " or ".join(flag(found.lstrip("-")) for found in nearest(name, known))
        return f"{name} is no flag of {self.prog}" + (f"; did you mean {near}?" if near else "")

    def _where(self) -> str:
        return f"see {self.prog} --help"


def _long(action: argparse.Action) -> str:
    """The flag as it is suggested: not one letter."""
    return next(spelling for spelling in action.option_strings if spelling.startswith("--"))


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag; other names behind its text."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        shown = action.option_strings[:1]
        if isinstance(action, argparse.BooleanOptionalAction):
            shown = [action.option_strings[0], f"--no-{action.option_strings[0][2:]}"]
        if action.nargs == 0:
            return ", ".join(shown)
        return f"{shown[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


# ------------------------------------------------------------------------------------------------------ options → flags


_METAVARS = {"int": "N", "float": "X", "tuple": "N,N"}


def add_options(parser: Parser, kind: type) -> None:
    """Give ``parser`` a flag for every field of a dataclass, in the groups of the help; ``EXAMPLES`` of it stand beside them."""
    hints, examples = typing.get_type_hints(kind), getattr(kind, "EXAMPLES", {})
    for group, title in GROUPS.items():
        chosen = [item for item in fields(kind) if item.metadata.get("group") == group]
        chosen.sort(key=lambda item: item.default is not MISSING)  # what is needed stands first
        if chosen or group == "run":
            shown = parser.add_argument_group(title, f"for example: {examples[group]}" if group in examples else None)
            for item in chosen:
                _add(parser, shown, item, hints[item.name])
            if group == "run":
                _add_common(shown)
    if foreign := getattr(kind, "FOREIGN", None):
        foreign.add(parser)
    needed = " ".join(f"{action.option_strings[0]} {_metavar(action)}" for action in parser.needed)
    parser.usage = f"{parser.prog} {needed} [options]".replace("  ", " ").replace("%", "%%")


def _metavar(action: argparse.Action) -> str:
    return f"{action.metavar} …" if action.nargs == "+" else str(action.metavar)


def _add(parser: Parser, group: argparse._ArgumentGroup, item: Field, annotation: Any) -> None:
    optional = False
    if isinstance(annotation, types.UnionType):
        annotation, optional = next(part for part in typing.get_args(annotation) if part is not type(None)), True
    name = (typing.get_origin(annotation) or annotation).__name__
    spellings = [flag(item.name), *map(flag, item.metadata["former"])]
    default = None if item.default is MISSING else item.default
    common = {"dest": item.name, "help": _text(item), "default": default}
    if name == "bool" and optional:  # --this or --no-this, and None where nothing is said
        group.add_argument(*spellings, action=argparse.BooleanOptionalAction, **common)
        return
    if name == "bool":
        group.add_argument(*spellings, action="store_true", **common)
        return
    choices, metavar = item.metadata["choices"], _METAVARS.get(name, item.name.upper())
    if annotation == tuple[str, ...]:
        action = group.add_argument(*spellings, nargs="+", type=nonempty, metavar=item.name.upper(), **common)
    else:
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else metavar
        action = group.add_argument(*spellings, type=reader(item, annotation), choices=choices, metavar=metavar, **common)
        if choices or item.metadata["exists"] or item.metadata["group"] == "model":
            parser.single.add(item.name)
    if item.default is MISSING:
        parser.needed.append(action)
    if item.metadata["positional"]:
        alone = {"dest": item.name + ALONE, "nargs": "?", "type": nonempty, "metavar": item.name.upper()}
        group.add_argument(**alone, help="the same without a flag")


def _text(item: Field) -> str:
    """Help of a flag: what it says, its default, its other names."""
    text = item.metadata["help"]
    if not any(item.default is empty for empty in (MISSING, None, False, True, ())):
        strings = isinstance(item.default, tuple) and isinstance(item.default[0], str)
        text += f" (default: {' '.join(item.default) if strings else item.default})"
    if former := item.metadata["former"]:
        text += f" (also {', '.join(map(flag, former))})"
    return text.replace("%", "%%")


def _add_common(group: argparse._ArgumentGroup) -> None:
    """What every verb takes."""
    group.add_argument(
        "--config",
        type=nonempty,
        action="append",
        metavar="FILE",
        help="YAML file of options; what stands on the command line counts before it",
    )
    group.add_argument("--print-config", action="store_true", help="print the options as such a file, and do nothing")
    group.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
    group.add_argument("--verbose", action="store_true", help="say what libraries say too, and where an error came from")
    group.add_argument("-h", "--help", action="help", help="show this and do nothing")


# ------------------------------------------------------------------------------------------------------ words → options


def parser_of(kind: type, prog: str) -> Parser:
    """The parser of a verb's options."""
    examples = getattr(kind, "EXAMPLES", {})
    epilog = "example:\n  " + examples["all"].replace("%", "%%") if "all" in examples else None
    parser = Parser(prog=prog, description=kind.__doc__, epilog=epilog)
    add_options(parser, kind)
    return parser


def parse(kind: type[Options], argv: list[str], *, prog: str) -> Options:
    """Read ``argv`` into ``kind``.

    Raises:
        InputError: on a bad command line.
    """
    return made(kind, parser_of(kind, prog).parse_args(argv))


def made(kind: type[Options], namespace: argparse.Namespace) -> Options:
    """The options that a namespace holds.

    Raises:
        InputError: if what a flag names is not there.
    """
    values = {item.name: getattr(namespace, item.name) for item in fields(kind) if "group" in item.metadata}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if foreign := getattr(kind, "FOREIGN", None):
        values[foreign.field] = foreign.read(namespace)
    options = kind(**values)
    check_there(options)
    return options
