"""Metrics that callers of Python file: functions of weights, and classes, checked before anything looks for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megatron_prune.axes.axis import AXES
from megatron_prune.config import shown
from megatron_prune.errors import InputError
from megatron_prune.importance.metric import METRICS, Metric

_OWN: set[str] = set()
"""Metrics that callers filed."""


def filed(name: str, axes: Sequence[str]) -> Callable[[Any], Any]:
    """The decorator that files a metric: see :func:`megatron_prune.api.metric`."""
    if not isinstance(name, str):  # @mp.metric above a function or a class
        raise InputError("mp.metric", got=shown(name), needed='the name of the metric: @mp.metric("name")')
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InputError("the name of a metric", got=repr(name), needed="a letter, then letters, digits and underscores")
    for axis in axes:
        AXES.get(axis)
    if name not in _OWN and name in METRICS.names():
        raise InputError(f"a metric {name!r} is there already", do="choose another name")

    def file(given: Any) -> Any:
        _check(name, given)
        if name in _OWN:  # a cell of a notebook that runs again
            METRICS.forget(name)
        _OWN.add(name)
        if isinstance(given, type):
            try:
                return METRICS.register(name)(given)
            except TypeError as error:
                raise InputError(str(error)) from None

        class OfWeights(Metric):
            __doc__ = given.__doc__
            reads_weights = True

            def per_weight(self, axis: str, tensor: Any, weight: Tensor, cols: range) -> Tensor:
                found = given(weight.float())
                shape = list(getattr(found, "shape", ()))
                if not hasattr(found, "double") or shape != list(weight.shape):
                    got = f"a tensor {shape}" if hasattr(found, "double") else type(found).__name__
                    raise InputError(
                        f"metric {name}: what it says of weights", got=got, needed=f"a tensor {list(weight.shape)}, as they are"
                    )
                return found.double()

            def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
                return total

        OfWeights.axes = frozenset(axes)
        METRICS.register(name)(OfWeights)
        return given

    return file


def _check(name: str, given: Any) -> None:
    """Refuse what is no metric before anything looks for it: one that cannot be made would fail where another was asked for."""
    if not isinstance(given, type):
        if not callable(given):
            raise InputError(
                f"metric {name}", got=shown(given), needed="a function of weights, or a class derived from mp.Metric"
            )
        return
    if not issubclass(given, Metric):
        raise InputError(f"metric {name}", got=f"the class {given.__name__}", needed="one derived from mp.Metric")
    read = {"reads_weights": "per_weight", "reads_units": "per_unit"}
    missing = {
        method for reads, method in read.items() if getattr(given, reads) and vars(Metric)[method] is getattr(given, method)
    }
    missing |= set(given.__abstractmethods__) | ({"sums"} if "gradients" in given.needs and not hasattr(given, "sums") else set())
    if missing:
        raise InputError(f"metric {name}: {given.__name__} lacks {', '.join(sorted(missing))}", do="define it, as mp.Metric says")
