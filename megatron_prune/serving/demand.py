"""What a shape has to be to be served as it was asked for, and what is said of one that is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Any, Callable

from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import InputError
from megatron_prune.families.family import Family
from megatron_prune.families.form import Refused, commonest, is_plain
from megatron_prune.serving import tensor_parallel
from megatron_prune.serving.nearest import nearest_shapes, sizes_in_words
from megatron_prune.serving.options import parse_serve
from megatron_prune.serving.runtime import RUNTIMES, Written


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked of every shape.

    Attributes:
        family, template: how it will be written: the family, and the ``config.json`` that it descends from.
        runtimes: names of those that are to load it.
        ranks: tensor-parallel sizes over which it is to divide.
    """

    family: Family
    template: dict[str, Any] | None = None
    runtimes: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()

    def problems(self, config: ModelConfig, *, of_layers: bool = False) -> list[str]:
        """What of a shape cannot be served, in words.

        Args:
            of_layers: look only at what single layers are.
        """
        written = written_as(config, self.family, self.template)
        found = [word for name in self.runtimes for word in RUNTIMES.get(name).problems(written, of_layers=of_layers)]
        return found + [word for ranks in self.ranks for word in tensor_parallel.problems(config, ranks, of_layers=of_layers)]

    def layer_problems(self, layer: ModelConfig) -> list[str]:
        """The same of a layer (:meth:`ModelConfig.of_layer`) of a model whose layers differ."""
        form = self.family.written_as(_differing(layer), self.template)[1]
        written = Written(layer, self.family.name, form)
        found = [word for name in self.runtimes for word in RUNTIMES.get(name).problems(written, of_layers=True)]
        return found + [word for ranks in self.ranks for word in tensor_parallel.problems(layer, ranks, of_layers=True)]

    def check(self, config: ModelConfig, before: ModelConfig | None = None) -> None:
        """Refuse a shape that the family cannot say, or that cannot be served.

        Args:
            before: the model that is cut: the nearest shapes that it can be cut to are named.

        Raises:
            InputError: naming what is wrong, the nearest shapes, and the families that would do.
        """
        refused, problems = self.family.refused(config), self.problems(config)
        if not refused and not problems:
            return
        shapes, families = self.ways_out(config, before)
        if not refused and config.vocab_size != self.period and not self.problems(replace(config, vocab_size=self.period)):
            families = ["choose the tokens again with megatron-prune vocab select --serve"]
        said = refused or Refused("--serve: the requested shape cannot be served so", got="; ".join(problems))
        nearest = f"{' or '.join(shapes)} (the nearest)" if shapes else None
        raise InputError(
            said.what,
            got=said.got,
            needed="; ".join(filter(None, (said.needed, nearest))) or None,
            do=" or ".join(families) if families else "choose other sizes" if refused or shapes else self._less(config),
        )

    def _less(self, config: ModelConfig) -> str:
        """What may be asked of a shape instead: the runtimes that load it, and the tensor-parallel sizes that can share it."""
        alone = lambda **asked: not replace(self, **{"runtimes": (), "ranks": (), **asked}).problems(config)
        words = [name for name in self.runtimes if alone(runtimes=(name,))]
        able = [ranks for ranks in range(1, max(self.ranks, default=0) + 1) if alone(ranks=(ranks,))]
        words += ["tp=" + ",".join(map(str, able))] if able else []
        return "ask less" + (f", such as --serve {','.join(words)}" if words else " of --serve")

    @property
    def period(self) -> int:
        """A number of tokens that every tensor-parallel size can share; what of a vocabulary can be shared repeats after it."""
        return tensor_parallel.PADDED * lcm(1, *self.ranks)

    def check_but_tokens(self, config: ModelConfig) -> None:
        """Refuse a model that cannot be served whatever its number of tokens.

        Raises:
            InputError: as :meth:`check`.
        """
        self.check(replace(config, vocab_size=self.period))

    def token_problems(self, config: ModelConfig) -> Callable[[int], list[str]]:
        """What of a model with so many tokens cannot be served, in words."""
        return lambda tokens: self.problems(replace(config, vocab_size=tokens))

    def ways_out(self, config: ModelConfig, before: ModelConfig | None) -> tuple[list[str], list[str]]:
        """The nearest shapes that can be served, in words, and the flags that write the same shape as what can be."""
        plain = before is not None and is_plain(config) and is_plain(before)
        shapes = nearest_shapes(config, before, self.problems, self.family.says) if plain else []
        others = self.family.others(config).items()
        able = [name for name, family in others if not replace(self, family=family, template=None).problems(config)]
        return [sizes_in_words(shape, config) for shape in shapes], [f"--target-family {name}" for name in able]


def demanded(serve: str | None, family: Family, template: dict[str, Any] | None) -> Demand:
    """What ``--serve`` asks of what is written as that.

    Raises:
        InputError: if it is not what :func:`parse_serve` reads.
    """
    runtimes, ranks = parse_serve(serve) if serve else ((), ())
    return Demand(family=family, template=template, runtimes=runtimes, ranks=ranks)


def _differing(layer: ModelConfig) -> ModelConfig:
    """A model much like such a layer whose layers differ."""
    usual = commonest(layer.of_layer(0))
    return replace(usual, num_layers=2, ffn_hidden_size=(usual.units("ffn"), usual.units("ffn") + 1))


def written_as(config: ModelConfig, family: Family, template: dict[str, Any] | None) -> Written:
    """A model as the ``config.json`` that it gets says it."""
    return Written(config, *family.written_as(config, template))


def served_by(config: ModelConfig, family: Family, template: dict[str, Any] | None) -> dict[str, list[str]]:
    """Name of every runtime → what of a model it does not do, in words."""
    written = written_as(config, family, template)
    return {name: RUNTIMES.get(name).problems(written) for name in RUNTIMES.names()}


def warnings(
    config: ModelConfig, family: Family, template: dict[str, Any] | None, before: ModelConfig | None = None
) -> list[str]:
    """A line for every runtime that does not do what is written, with what it would do.

    Args:
        before: the model that is cut: what was so of it already is left out.
    """
    known = served_by(before, family, template) if before is not None else {}
    lines = []
    for name, problems in served_by(config, family, template).items():
        if not problems or known.get(name):
            continue
        shapes, families = Demand(family=family, template=template, runtimes=(name,)).ways_out(config, before)
        out = [*families, *([f"{' or '.join(shapes)} (the nearest shapes)"] if shapes else [])]
        lines.append("; ".join(problems) + (f"; it loads {', '.join(out)}" if out else ""))
    return lines
