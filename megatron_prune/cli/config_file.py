"""Options in a YAML file: a flag's name and its value, a line each. What stands on the command line counts before it."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_prune.cli.parser import Parser, parser_of
from megatron_prune.config import GROUPS
from megatron_prune.errors import InputError
from megatron_prune.files.documents import read_text
from megatron_prune.verbs.table import VERBS, options_of

LIMIT = 1 << 20
"""Bytes of a file of options."""

_NULL, _BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
_HEAD = "# options of megatron-prune"
_TRUE = ("true", "yes", "on")


def named_files(argv: list[str]) -> list[Path]:
    """The files that a command line names with ``--config``; of two that say one thing the later counts."""
    found = [argv[at + 1] for at, word in enumerate(argv[:-1]) if word == "--config"]
    return [Path(name) for name in found + [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]]


def set_defaults(parser: Parser, path: Path) -> None:
    """Make what a file says the defaults of ``parser``, each value read as if it stood on the command line.

    What is an option of another verb alone, and says its default there, is passed over: so a file of one verb serves another.

    Raises:
        InputError: on a file that is no mapping of flags to values, a flag that is not known (naming the nearest) or stands twice,
            or one of another verb that says something.
    """
    seen: dict[str, str] = {}
    for key, node in _entries(path):
        flag = parser.spelled("--" + key)
        action = parser._option_string_actions.get(flag)
        if action is not None and action.dest in ("help", "config", "print_config"):
            raise InputError(f"{path}: {key} is for the command line alone", do="leave it out")
        if action is None and (verb := _verb_of(path, key)):
            if _is_default(verb, key, node):
                continue
            raise InputError(f"{path}: {key} is an option of megatron-prune {verb}, not of {parser.prog}", do="leave it out")
        if action is None:
            raise InputError(f"{path}: {parser.unknown('--' + key)}", needed="names of flags, without their dashes")
        if action.dest in seen:
            said = f"{key} twice" if seen[action.dest] == key else f"{seen[action.dest]} and {key}, which are the same"
            raise InputError(f"{path} says {said}", do="leave one out")
        seen[action.dest] = key
        try:
            parser.set_defaults(**{action.dest: _value(parser, action, flag, node)})
        except InputError as error:
            raise InputError(f"{path}: {str(error).partition(chr(10))[0]}") from None


def _verb_of(path: Path, key: str) -> str | None:
    """The verb that takes an option: the one that the head of the file names, or else the first; ``None``: none does."""
    head = read_text(path, limit=LIMIT, error=InputError).partition("\n")[0].removeprefix(_HEAD).strip()
    for verb in sorted(VERBS, key=lambda verb: verb != head):
        parser = parser_of(options_of(verb), verb)
        if parser.spelled("--" + key) in parser._option_string_actions:
            return verb
    return None


def _is_default(verb: str, key: str, node: yaml.Node) -> bool:
    """Whether the value of an option of ``verb`` says nothing."""
    parser = parser_of(options_of(verb), verb)
    name = parser.spelled("--" + key)
    action = parser._option_string_actions[name]
    try:
        value = _value(parser, action, name, node)
    except InputError:
        return False
    return (tuple(value) if isinstance(value, list) else value) == action.default


def _entries(path: Path) -> list[tuple[str, yaml.Node]]:
    text = read_text(path, limit=LIMIT, error=InputError)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path} is not YAML{where}", got=getattr(error, "problem", None) or type(error).__name__) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise InputError(f"{path}", got=f"a YAML {root.id}", needed="lines of the form flag: value")
    return [(key.value, node) for key, node in root.value if node.tag != _NULL]


def _value(parser: Parser, action: argparse.Action, flag: str, node: yaml.Node) -> Any:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise InputError(f"{flag} has values within values; it needs one, or a list of them")
    if action.dest in parser.single and len(items) != 1:
        raise InputError(f"{flag} takes one value, not {len(items)}")
    words = [item.value for item in items]
    if action.nargs == 0:
        if isinstance(node, yaml.SequenceNode) or node.tag != _BOOL:
            raise InputError(f"{flag} is neither true nor false")
        return words[0].lower() in _TRUE
    if not words:
        return ()
    said = [flag, *words] if action.nargs in ("+", "*") else [f"{flag}={','.join(words)}"]
    namespace, others = parser.parse_known_args(said)
    if others:
        raise InputError(f"{flag} has a value that begins with dashes")
    return getattr(namespace, action.dest)


def text_of(kind: type, namespace: argparse.Namespace, verb: str) -> str:
    """The file that says all options of a verb, those that were not given with ``null``: read again it says the same."""
    lines = [f"{_HEAD} {verb}"]
    for group, title in GROUPS.items():
        chosen = [item for item in fields(kind) if item.metadata.get("group") == group]
        lines += ["", f"# {title}"] if chosen else []
        for item in chosen:
            value = getattr(namespace, item.name)
            note = "  # needed" if value is None and item.default is MISSING else ""
            lines.append(f"{item.name}: {_written(value)}{note}")
    if (foreign := getattr(kind, "FOREIGN", None)) and (given := foreign.read(namespace)):
        lines += ["", "# Megatron's own", *(f"{name}: {_written(value)}" for name, value in given.items())]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).removesuffix("...\n").strip()
