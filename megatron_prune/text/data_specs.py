"""What ``--data`` names: sources and their weights, as the user writes them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import InputError

SELF = "self"
"""The model's own samples."""

_WEIGHTED = re.compile(r"(?P<name>.*):(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?inf|[+-]?nan)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """One source that the user names.

    Attributes:
        name: a path, a known data set, a hub id, or ``self``.
        weight: its share of the second moments; the weights of one request add up to 1.
    """

    name: str
    weight: float

    @property
    def is_self(self) -> bool:
        """Whether it is the model's own samples, to be drawn now or kept in a file."""
        return self.name == SELF or self.name.endswith(".safetensors")


def parse_data(specs: Sequence[str] | None) -> list[DataSpec]:
    """``["brown.txt:0.5", "self:0.5"]`` → sources whose weights add up to 1.

    Only a number after the last colon is a weight (a file called ``a:1`` is written ``a:1:1``). Without weights all that is
    named counts the same; but data named without any weight and without own samples is joined by ``self``: half is data, half
    own samples. To use data alone, give it a weight (``data.txt:1``). Nothing named is ``self`` alone.

    Raises:
        InputError: if a name is empty or listed twice, a weight is not a positive number, or only some have weights.
    """
    if not specs:
        return [DataSpec(name=SELF, weight=1.0)]
    parts = [split_weight(spec.strip()) for spec in specs]
    names = [name for name, _ in parts]
    for number, name in enumerate(names):
        if not name:
            raise InputError("--data", got=repr(specs[number]), needed="NAME or NAME:WEIGHT")
        if _identity(name) in map(_identity, names[:number]):
            raise InputError(f"--data lists {name} twice", do="name it once, with the weight it is to have")
    weighted = [weight is not None for _, weight in parts]
    if any(weighted) and not all(weighted):
        bare = names[weighted.index(False)]
        raise InputError("--data", got=f"{bare} without a weight beside weighted sources", needed="weights for all or for none")
    if all(weighted):
        return _normalised(names, [float(weight) for _, weight in parts if weight is not None])
    if any(DataSpec(name=name, weight=1.0).is_self for name in names):
        return _normalised(names, [1.0] * len(names))
    return _normalised([*names, SELF], [1.0] * len(names) + [float(len(names))])


def _identity(name: str) -> str:
    """The same for two spellings of one file or pair of files."""
    path = Path(name)
    return name if name == path.stem else os.path.realpath(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)


def split_weight(spec: str, flag: str = "--data") -> tuple[str, float | None]:
    """``"name:weight"`` → (name, weight or ``None``).

    Raises:
        InputError: if the weight is not a positive number.
    """
    match = _WEIGHTED.fullmatch(spec)
    if match is None:
        return spec, None
    weight = float(match["weight"])
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{flag}: the weight of {match['name']}", got=match["weight"], needed="a positive number")
    return match["name"].strip(), weight


def _normalised(names: list[str], weights: list[float]) -> list[DataSpec]:
    scaled = [weight / max(weights) for weight in weights]
    shares = [weight / math.fsum(scaled) for weight in scaled]
    if min(shares) <= 0:
        raise InputError("--data", got=f"weights {weights}", needed="weights that are less far apart")
    return [DataSpec(name=name, weight=share) for name, share in zip(names, shares)]
