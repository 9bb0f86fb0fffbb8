"""Arguments as a checkpoint stores them: ``args`` in its files, or the ``model`` section of Megatron-Bridge's ``run_config.yaml``."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from megatron_prune.errors import CheckpointError, plain, reason
from megatron_prune.files.documents import read_text, shorten
from megatron_prune.files.pickled import Inert
from megatron_prune.files.yaml_nodes import compose, entries

_WRAPPED = re.compile(r"^(?:module\.)+")
RUN_CONFIG = "run_config.yaml"
_YAML_BYTES = 1 << 22
_LONGEST = 10_000


def unwrapped(key: str) -> str:
    """A tensor's name without those of modules that wrapped the model when it was saved."""
    return _WRAPPED.sub("", key)


def args_of(content: dict[str, Any], where: object) -> dict[str, Any] | None:
    """``args`` of a checkpoint's content as a dictionary; ``None`` where it holds none.

    Raises:
        CheckpointError: if they are of no kind that has names.
    """
    args = content.get("args")
    if isinstance(args, (Namespace, SimpleNamespace)):
        args = vars(args)
    elif isinstance(args, Inert):  # a dataclass, or a namespace of another library
        args = next((part for part in _states(args) if isinstance(part, dict)), args)
    if args is not None and not (isinstance(args, dict) and all(isinstance(name, str) for name in args)):
        raise CheckpointError(f"{where}: args", got=shorten(args), needed="a namespace, or a dictionary of names")
    version = content.get("checkpoint_version")
    if version is not None and not (type(version) in (int, float) and version >= 2):
        raise CheckpointError(
            f"{where}: checkpoint_version",
            got=shorten(version),
            needed="2.0 or later: before, heads were stored in another order",
        )
    return args


def _states(args: Inert) -> tuple[Any, ...]:
    return args.state if isinstance(args.state, tuple) else (args.state,)


def run_config(folder: Path) -> dict[str, Any] | None:
    """The ``model`` section of Bridge's ``run_config.yaml`` in an iteration directory; ``None`` where there is none.

    Nothing is built from it: what is tagged or has a ``_target_`` becomes an :class:`Inert`.

    Raises:
        CheckpointError: if it is not YAML, has no such section, or tags a text as a number that it is not.
    """
    file = folder / RUN_CONFIG
    if not file.is_file():
        return None
    model = entries(compose(read_text(file, limit=_YAML_BYTES), file)).get("model")
    if not isinstance(model, yaml.MappingNode):
        raise CheckpointError(f"{file} has no section 'model'", needed="what Megatron-Bridge writes beside a checkpoint")
    return {name: _named(file, name, node) for name, node in entries(model).items() if name not in ("_target_", "_call_")}


def _named(file: Path, name: str, node: yaml.Node) -> Any:
    try:
        return _value(node)
    except (ValueError, KeyError, IndexError) as error:  # !!int x, !!bool maybe, a number of thousands of digits
        raise CheckpointError(
            f"{file}: model.{plain(name, 80)}", got=reason(error), needed="a value that its tag can be"
        ) from None


def _value(node: yaml.Node) -> Any:
    """A plain value, a list of plain values, or an :class:`Inert`: what is nested deeper says nothing of a model."""
    if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN:
        return yaml.constructor.SafeConstructor().construct_object(node)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq" and len(node.value) <= _LONGEST:
        return [_value(part) if isinstance(part, yaml.ScalarNode) else Inert("a list in a list") for part in node.value]
    target = entries(node).get("_target_")
    if isinstance(target, yaml.ScalarNode):
        arguments = entries(node).get("_args_")
        return Inert(target.value, None if arguments is None else ())
    return Inert(node.tag, ())


_PLAIN = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
