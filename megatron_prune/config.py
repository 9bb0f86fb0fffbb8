"""Options as frozen dataclasses: one field, one flag (``cli/parser.py``), one default, one help text."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field
from pathlib import Path
from typing import Any, Callable, NamedTuple

from megatron_prune.errors import InputError

GROUPS = {
    "model": "what is read, and what is written",
    "shape": "what is to stay",
    "text": "the text",
    "how": "how it is done",
    "run": "how it runs",
    "expert": "seldom needed",
}
"""Groups of the help, in its order → their titles."""


class Limits(NamedTuple):
    """The numbers that an option takes; ``None`` where there is no such limit."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def hold(self, number: float) -> bool:
        """Whether a number is one of them."""
        low = (self.least is None or number >= self.least) and (self.above is None or number > self.above)
        return low and (self.most is None or number <= self.most) and (self.below is None or number < self.below)

    @property
    def words(self) -> str:
        """What is needed: ``a positive number``, ``at least 0``, ``above 0 and at most 1``."""
        if self in (Limits(least=1), Limits(above=0)):
            return "a positive number"
        said = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {number:g}" for word, number in said.items() if number is not None)


def flag(name: str) -> str:
    """An option's name as the help spells it: ``seq_length`` → ``--seq-length``."""
    return f"--{name.replace('_', '-')}"


MEANT = {
    "budget": ("ratio", "params"),
    "sparsity": ("ratio",),
    "pruning_ratio": ("ratio",),
    "prune_ratio": ("ratio",),
    "parameters": ("params",),
    "num_parameters": ("params",),
    "target_params": ("params",),
    "intermediate_size": ("ffn_hidden_size_remain",),
    "n_inner": ("ffn_hidden_size_remain",),
    "d_ff": ("ffn_hidden_size_remain",),
    "ffn": ("ffn_hidden_size_remain",),
    "mlp": ("ffn_hidden_size_remain", "drop_mlp"),
    "hidden": ("hidden_size_remain",),
    "d_model": ("hidden_size_remain",),
    "n_embd": ("hidden_size_remain",),
    "dim": ("hidden_size_remain",),
    "width": ("hidden_size_remain", "ffn_hidden_size_remain"),
    "layers": ("num_layers_remain",),
    "num_hidden_layers": ("num_layers_remain",),
    "n_layer": ("num_layers_remain",),
    "n_layers": ("num_layers_remain",),
    "depth": ("num_layers_remain", "drop_layers"),
    "heads": ("num_attention_heads_remain",),
    "n_head": ("num_attention_heads_remain",),
    "n_heads": ("num_attention_heads_remain",),
    "num_heads": ("num_attention_heads_remain",),
    "num_key_value_heads": ("num_query_groups_remain",),
    "num_kv_heads": ("num_query_groups_remain",),
    "n_kv_heads": ("num_query_groups_remain",),
    "kv_heads": ("num_query_groups_remain",),
    "kv_groups": ("num_query_groups_remain",),
    "model": ("load",),
    "model_path": ("load",),
    "model_dir": ("load",),
    "model_name_or_path": ("load",),
    "input_model": ("load",),
    "checkpoint": ("load",),
    "o": ("save",),
    "out": ("save",),
    "output": ("save",),
    "output_dir": ("save",),
    "output_path": ("save",),
    "save_path": ("save",),
    "data_path": ("data",),
    "dataset": ("data", "data_path"),
    "calibration_data": ("data",),
    "calib_data": ("data",),
    "calib_dataset": ("data",),
    **dict.fromkeys(
        ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size", "target_tensor_parallel_size"),
        ("target_tensor_parallel_size", "tensor_model_parallel_size"),
    ),
    **dict.fromkeys(
        ("pp", "pp_size", "pipeline_parallel", "pipeline_parallel_size")
        + ("pipeline_model_parallel_size", "target_pipeline_parallel_size"),
        ("target_pipeline_parallel_size", "pipeline_model_parallel_size"),
    ),
}
"""Words of other tools, and of Hugging Face's configurations → the options that mean this, as far as a verb has them."""


def nearest(name: str, spellings: Mapping[str, str]) -> list[str]:
    """Options that a name which is none may have been meant for: what other tools call so, or the one that is spelled most alike.

    Args:
        spellings: every spelling of an option, former ones too → the option.
    """
    name = name.lower().lstrip("-").replace("-", "_")
    if meant := [found for found in MEANT.get(name, ()) if found in spellings]:
        return meant
    return [spellings[near] for near in difflib.get_close_matches(name, spellings, n=1)]


def option(
    help: str,
    default: Any = MISSING,
    *,
    group: str = "how",
    choices: list[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    former: tuple[str, ...] = (),
    positional: bool = False,
    exists: bool = False,
) -> Any:
    """A dataclass field that becomes a flag; required when it has no default.

    Args:
        group: where the help shows it, one of :data:`GROUPS`.
        least, above, most, below: the numbers that are taken: from ``least`` on, or those above ``above``; up to ``most``, or those
            below ``below``.
        former: other names that the flag had, or has in other programs; they are taken too.
        positional: the value may also stand alone, without the flag.
        exists: the value names files or directories of this machine, which must be there.
    """
    assert group in GROUPS, group
    limits = Limits(least=least, above=above, most=most, below=below)
    metadata = {"help": help, "group": group, "choices": choices, "limits": limits}
    metadata |= {"former": former, "positional": positional, "exists": exists}
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


def _within(read: Callable[[str], Any], limits: Limits) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        number = read(text)
        if not limits.hold(number):
            raise argparse.ArgumentTypeError(f"{number} is not {limits.words}")
        return number

    return read if limits == Limits() else checked


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
        return reader(item, annotation)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def reader(item: Field, annotation: type) -> Callable[[str], Any]:
    """What turns one word into the value of a field, or raises ``argparse.ArgumentTypeError`` saying what is wrong with it."""
    read = _within({**_TYPES, "bool": truth}[annotation.__name__], item.metadata["limits"])
    choices = item.metadata["choices"]

    def chosen(text: str) -> Any:
        value = read(text)
        if value not in choices:
            near = difflib.get_close_matches(text, map(str, choices), n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is none of {', '.join(map(str, choices))}{meant}")
        return value

    return chosen if choices else read


_TYPES: dict[str, Callable[[str], Any]] = {"int": whole, "float": finite, "str": nonempty, "tuple": integers}


def check_limits(options: Any) -> None:
    """Refuse numbers that their options do not take: of options that no command line was read into.

    Raises:
        InputError: naming the flag.
    """
    for item in dataclasses.fields(options):
        value, limits = getattr(options, item.name), item.metadata.get("limits", Limits())
        if isinstance(value, (int, float)) and not (math.isfinite(value) and limits.hold(value)):
            raise InputError(flag(item.name), got=value, needed=limits.words or "a finite number")


def given(options: Any) -> dict[str, Any]:
    """Options that differ from their defaults: what a recipe records."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if getattr(options, f.name) != f.default}


def shown(value: object, limit: int = 80) -> str:
    """A value that a program gave, for a message: as Python writes it, or what it is where that is long."""
    text = repr(value)
    if len(text) <= limit and "\n" not in text:
        return text
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else "")


def made_of(kind: type, values: Mapping[str, Any], *, of: str) -> Any:
    """Options of a dataclass from values that a program gives, as its fields say them: numbers may be of any kind, paths are
    paths or texts, sequences of any kind; of a former name the value is the field's.

    Args:
        of: what takes the options, for messages.

    Raises:
        InputError: naming an option that there is not (with the nearest), one that is needed, or a value that does not fit.
    """
    hints, known = typing.get_type_hints(kind), {item.name: item for item in dataclasses.fields(kind)}
    former = {old: item.name for item in known.values() for old in item.metadata.get("former", ())}
    found = {}
    for name, value in values.items():
        field_name = former.get(name, name)
        if field_name not in known:
            near = " or ".join(nearest(name, {**{each: each for each in known}, **former}))
            raise InputError(f"{name} is no argument of {of}" + (f"; did you mean {near}?" if near else ""))
        found[field_name] = _fitted(known[field_name], hints[field_name], value)
    if missing := [item.name for item in known.values() if _is_needed(item) and item.name not in found]:
        raise InputError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")
    options = kind(**found)
    check_there(options)
    return options


def _is_needed(item: Field) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _fitted(item: Field, annotation: Any, value: Any) -> Any:
    """A value as a field has it."""
    if "group" not in item.metadata or value is None:
        return value
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if annotation == tuple[int, ...] and isinstance(value, str):
        raise InputError(item.name, got=shown(value), needed="a list of whole numbers, such as [7, 13]")
    if annotation in (tuple[str, ...], tuple[int, ...]):
        several = (value,) if isinstance(value, (str, Path, Mapping)) or not isinstance(value, Iterable) else value
        return tuple(_one(item, typing.get_args(annotation)[0], each) for each in several)
    return _one(item, annotation, value)


def _one(item: Field, annotation: type, value: Any) -> Any:
    if annotation is bool:
        if not isinstance(value, bool):
            raise InputError(item.name, got=shown(value), needed="True or False")
        return value
    fits = {int: numbers.Integral, float: numbers.Real, str: (str, Path, numbers.Integral)}[annotation]
    is_place = item.metadata["exists"] or item.metadata["group"] == "model"
    if isinstance(value, bool) or not isinstance(value, fits) or (is_place and isinstance(value, numbers.Integral)):
        choices, text = item.metadata["choices"], "a name, or a path" if is_place else _text_of(item)
        needed = (
            "one of " + ", ".join(map(str, choices))
            if choices
            else {int: "a whole number", float: "a number", str: text}[annotation]
        )
        raise InputError(item.name, got=shown(value), needed=needed, do=None if choices or is_place else _written(item, value))
    try:
        return reader(item, annotation)(str(value) if annotation is not float else repr(float(value)))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{item.name}: {error}") from None


def _text_of(item: Field) -> str:
    """What an option of a text takes, with the example that its help has."""
    found = re.search(r"such as ([^\s;:)]+)", item.metadata["help"])
    example = found.group(1).rstrip(",") if found else ""
    amount = re.match(r"\d", str(item.default or example))
    return ("a text, or a whole number" if amount else "a text") + (f', such as {item.name}="{example}"' if example else "")


def _written(item: Field, value: Any) -> str | None:
    """How several things are written as one text, where a program gave them as several."""
    if isinstance(value, Mapping):
        words = [f"{name}={each}" for name, each in value.items()]
    elif isinstance(value, (list, tuple)) and all(isinstance(each, (str, int)) for each in value):
        words = list(map(str, value))
    else:
        return None
    return f'write it as one text: {item.name}="{",".join(words)}"' if words else None


def check_there(options: Any) -> None:
    """Refuse names of files that are not there, before anything that takes time.

    Raises:
        InputError: naming the flag.
    """
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if not item.metadata.get("exists") or value is None:
            continue
        for name in (value,) if isinstance(value, str) else value:
            try:
                Path(name).stat()
            except (FileNotFoundError, NotADirectoryError):
                raise InputError(f"{flag(item.name)} {name}: no such file or directory") from None
            except OSError as error:
                raise InputError(f"{flag(item.name)} {name} cannot be read", got=error.strerror) from None
