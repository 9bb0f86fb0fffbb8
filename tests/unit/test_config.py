"""Options as fields of dataclasses, and errors that a user can read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.cli.parser import parse
from megatron_prune.config import given as given_options
from megatron_prune.config import check_limits, integers, made_of, option
from megatron_prune.errors import CheckpointError, InputError, PlanError, PruneError, raise_all


@dataclass(frozen=True, kw_only=True)
class Options:
    load: str = option("where from")
    kind: str = option("which", "b", choices=["a", "b"])
    size: int | None = option("how large", None)
    seed: int = option("which draw", 1234)
    rate: float = option("how fast", 0.5)
    layers: tuple[int, ...] | None = option("which go", None)
    strict: bool = option("refuse", False)


@given(st.lists(st.integers(-99, 99)))
def test_a_list_of_integers_is_read_with_or_without_spaces(numbers):
    assert integers(",".join(map(str, numbers))) == tuple(numbers)
    assert integers(" , ".join(map(str, numbers))) == tuple(numbers)


@pytest.mark.parametrize("text", ["a", "1;2", "1.5", "1,,b", "0x3"])
def test_a_list_of_something_else_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole numbers such as 7,13"):
        integers(text)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    count: int = option("of samples", 1, least=1)
    share: float = option("of a rate", 0.5, above=0, most=1)
    decay: float = option("of a moment", 0.9, least=0, below=1)
    rate: float | None = option("any", None)


@pytest.mark.parametrize(
    "name, value, needed",
    [
        ("count", 0, "a positive number"),
        ("share", 0.0, "above 0 and at most 1"),
        ("share", 2.0, "above 0 and at most 1"),
        ("decay", -0.1, "at least 0 and below 1"),
        ("decay", 1.0, "at least 0 and below 1"),
        ("share", float("nan"), "above 0 and at most 1"),
        ("rate", float("inf"), "a finite number"),
    ],
)
def test_a_number_outside_of_what_an_option_takes_is_refused_by_its_flag(name, value, needed):
    """By the same limits whether a program gives it, a file of options, or a word of a command line."""
    with pytest.raises(InputError, match=f"--{name}(?s:.*)needed: {needed}$"):
        check_limits(Numbers(**{name: value}))
    with pytest.raises(InputError, match=f"--{name}: .* is not {needed}|is not a finite number"):
        parse(Numbers, [f"--{name}", str(value)], prog="prog")
    with pytest.raises(InputError, match=f"{name}: .* is not {needed}|is not a finite number"):
        made_of(Numbers, {name: value}, of="numbers()")


def test_the_ends_of_a_range_are_taken():
    for held in (Numbers(count=1, share=1.0, decay=0.0), Numbers(rate=-7.5), Numbers()):
        check_limits(held)


def test_only_what_differs_from_the_defaults_is_recorded():
    assert given_options(Options(load="x", seed=1234, rate=2.0)) == {"load": "x", "rate": 2.0}


# ----------------------------------------------------------------------------------------------------------- errors


def test_an_error_says_what_was_got_what_was_needed_and_what_to_do():
    text = str(InputError("--size", got=0, needed="a positive number", do="ask for more"))
    assert text.split("\n") == ["--size", "  got: 0", "  needed: a positive number", "  what to do: ask for more"]
    assert str(InputError("only this")) == "only this"


def test_every_error_of_a_user_has_one_root():
    for kind in (InputError, CheckpointError, PlanError):
        assert issubclass(kind, InputError) and issubclass(kind, PruneError)


@pytest.mark.parametrize("count", [0, 1, 20, 21, 300])
def test_problems_are_raised_together_up_to_twenty(count):
    problems = [f"problem {n}" for n in range(count)]
    if count == 0:
        raise_all(PlanError, "the plan", problems)
        return
    with pytest.raises(PlanError) as error:
        raise_all(PlanError, "the plan", problems, do="mend it")
    lines = str(error.value).split("\n")
    assert lines[0] == "the plan" and lines[-1] == "  what to do: mend it"
    assert lines[1:-1] == [f"  - {p}" for p in problems[:20]] + ([f"  - … and {count - 20} more"] if count > 20 else [])
