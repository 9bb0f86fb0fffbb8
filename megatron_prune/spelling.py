"""What the command line says, as a caller of Python knows it: arguments instead of flags, and the keys of ``target``."""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_prune.config import MEANT, shown
from megatron_prune.errors import InputError, PruneError
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.runtime.reporting import log


@contextlib.contextmanager
def reworded(reword: Callable[[str], str]) -> Iterator[None]:
    """What is said meanwhile, in other words: errors of ours that pass through, and the log."""

    def heard(record: logging.LogRecord) -> bool:
        record.msg, record.args = reword(record.getMessage()), ()
        return True

    log.addFilter(heard)
    try:
        yield
    except PruneError as error:
        error.args = (reword(str(error)),)
        raise
    finally:
        log.removeFilter(heard)


# ----------------------------------------------------------------------------------------------------- flags → arguments

_COMMAND = re.compile(r"\b(?:megatron-prune|torchrun) [a-z-].*?(?=[,;)\n]| or | and |$)")
"""A command that is to be typed into a shell: its flags stay flags."""
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:[-_][a-z0-9]+)*)(?![\w-])")
_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:,\d+)*"


class Arguments:
    """The options of a verb as arguments of the function that calls it; called with a text, says that text in their words.

    ``--flag`` becomes ``flag=``, and ``--flag VALUE`` ``flag=VALUE`` where that surely is its value: joined by ``=``, what the
    call gave, one of the option's choices, a number, or the last word of a line.

    Args:
        kind: the options.
        given: values that the call gave.
        renamed: option → the argument that it is, where their names differ.
    """

    def __init__(self, kind: type, given: Mapping[str, Any], renamed: Mapping[str, str]):
        self._given, self._renamed, self._hints = given, renamed, typing.get_type_hints(kind)
        self._options = {item.name: item for item in fields(kind) if "group" in item.metadata}
        self._former = {old: item.name for item in self._options.values() for old in item.metadata["former"]}

    def __call__(self, text: str) -> str:
        parts, end = [], 0
        for command in _COMMAND.finditer(text):
            parts += [self._prose(text[end : command.start()]), command.group()]
            end = command.end()
        said = "".join([*parts, self._prose(text[end:])])
        first = re.match(r"\w+(?=:|\n|$)", said)
        return self._renamed.get(first.group(), first.group()) + said[first.end() :] if first else said

    def _prose(self, text: str) -> str:
        parts, end = [], 0
        for flag in _FLAG.finditer(text):
            if flag.start() < end or (found := self._option(flag.group(1))) is None:
                continue
            name, negated = found
            value = None if self._is_switch(name) else self._value(name).match(text, flag.end())
            end_of_words = value.end() if value else flag.end()
            words = value.group(1) or value.group(2) if value else None
            said = self.spelled(name, words, negated=negated)
            parts += [text[end : flag.start()], said.removesuffix("=") if text[end_of_words : end_of_words + 1] == ":" else said]
            end = end_of_words
        text = "".join([*parts, text[end:]])
        return re.sub(r"\b(" + "|".join(KEYS) + r")_remain\b", r"\1", text)

    def spelled(self, name: str, value: str | None = None, *, negated: bool = False) -> str:
        """An option as the argument, or the key of ``target``, that it is."""
        if self._is_switch(name):
            return f"{self._renamed.get(name, name)}={not negated}"
        if value is not None:
            annotation = str(self._hints[name])
            value = f"[{value.replace(',', ', ')}]" if "tuple[int" in annotation else value
            value = f'"{value}"' if "str" in annotation else value
        if name in _KEY_OF:
            return f'"{_KEY_OF[name]}"' + (f": {value}" if value is not None else "")
        return f"{self._renamed.get(name, name)}={value or ''}"

    def _option(self, flag: str) -> tuple[str, bool] | None:
        """(the option that a flag is, whether it says no); ``None``: it is none of this verb's."""
        name = flag.replace("-", "_")
        name = self._former.get(name, name)
        if name in self._options:
            return name, False
        positive = name.removeprefix("no_")
        return (positive, True) if positive != name and positive in self._options and self._is_switch(positive) else None

    def _is_switch(self, name: str) -> bool:
        annotation = self._hints[name]
        return annotation is bool or (isinstance(annotation, types.UnionType) and bool in typing.get_args(annotation))

    def _value(self, name: str) -> re.Pattern[str]:
        """What follows a flag and is its value."""
        given = self._given.get(name)
        several = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        choices = self._options[name].metadata["choices"] or ()
        known = [*map(str, several), *map(str, choices)]
        words = sorted(map(re.escape, filter(None, known)), key=len, reverse=True)
        last = r"(?!out$|too$|it$)[\w.:=/-]+(?=$|\n|, --)"
        return re.compile(rf"=([^\s,;)]+)| ((?:{'|'.join([*words, _NUMBER])})(?=[\s,;:.)]|$)|{last})", re.MULTILINE)


# ---------------------------------------------------------------------------------------------------- the keys of target

_KEY_OF = {name: name.removesuffix("_remain") for name in (*TargetOptions.SIZES, *TargetOptions.BY_LAYER, *TargetOptions.BUDGETS)}
KEYS = {key: name for name, key in _KEY_OF.items()}
"""Key of ``target`` → the option that it is."""

_NOT_BESIDE = {"load", *_KEY_OF, *(item.name for item in fields(ForeignOptions))}
"""Options that are no answer to a key that there is not: what is read, what ``target`` says, and what is said of the checkpoints
of others."""

NEEDED = 'sizes (target={"ffn_hidden_size": 1152, "num_layers": 24}), a budget (target={"ratio": 0.25}), a plan, or its file'


def nearest_keys(name: str) -> list[str]:
    """Keys of ``target`` that one which is not may have been meant for, the likeliest first."""
    name = name.lower()
    if name.removesuffix("_remain") in KEYS:
        return [name.removesuffix("_remain")]
    if meant := [_KEY_OF[option] for option in MEANT.get(name, ()) if option in _KEY_OF]:
        return meant
    holding = [key for key in KEYS if name in key.split("_") or f"_{name}_" in f"_{key}_" or (len(name) > 2 and name in key)]
    return holding[:3] or difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)


def options_of_target(target: Any, kind: type, beside: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a pruning that ``target`` says.

    Args:
        kind: the options of the verb.
        beside: what stands beside it: a head that is untied, or tokens that stay, are something to do by themselves.

    Raises:
        InputError: if it says nothing, or is neither sizes nor a budget nor a plan; naming a key that there is not, and the
            nearest.
    """
    if isinstance(target, (str, Path)) or hasattr(target, "dumps"):
        return {"plan": target}
    if not isinstance(target, Mapping):
        raise InputError("target=", got=shown(target), needed=NEEDED)
    for key in target:
        if key in KEYS:
            continue
        if key == "plan":
            raise InputError("'plan' is no key of target=", do="give the plan, or its file, as target= itself")
        if key in ("vocab_size", "vocab", "vocabulary"):
            do = f"mp.trim_vocabulary(…, size={shown(target[key])}), or say vocab_plan= beside"
            raise InputError(f"{key!r} is no key of target=: tokens that stay are chosen by themselves", do=do)
        if key in {item.name for item in fields(kind) if "group" in item.metadata} - _NOT_BESIDE:
            raise InputError(f"{key!r} is no key of target=", do=f"say it beside: {key}={shown(target[key])}")
        meant = nearest_keys(str(key))
        near = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""
        raise InputError(f"{key!r} is no key of target={near}", needed="some of " + ", ".join(KEYS))
    said = {KEYS[key]: value for key, value in target.items() if value is not None}
    if not said and not (beside.get("untie") or beside.get("vocab_plan")):
        raise InputError("target= says nothing", got=shown(target), needed=NEEDED)
    return said


def check_named(options: Mapping[str, Any]) -> None:
    """Refuse a metric that is not named.

    Raises:
        InputError: saying how it gets a name.
    """
    for name in ("metric", "depth_metric", "metrics"):
        given = options.get(name)
        for each in given if isinstance(given, (list, tuple)) else (given,):
            if callable(each):
                raise InputError(f"{name}=", got=shown(each), needed="a name", do='give it one: @mp.metric("mine")')


def check_beside(options: Mapping[str, Any]) -> None:
    """Refuse what belongs into ``target`` and stands beside it, and a metric that is not named.

    Raises:
        InputError: naming the key.
    """
    check_named(options)
    for name in options:
        if (key := _KEY_OF.get(name, name)) in KEYS:
            raise InputError(f"{name}= is no argument of its own", do=f'say it in target=: {{"{key}": {shown(options[name])}}}')
