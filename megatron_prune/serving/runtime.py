"""What a runtime is: the models that it does not load, or computes otherwise, as rules that were tried on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, NamedTuple

from megatron_prune.arch.model import ModelConfig
from megatron_prune.registry import Registry

RUNTIMES: Registry[Runtime] = Registry("runtime", "megatron_prune.serving.runtimes")

REFUSED, SILENT = "refuses it", "computes something else, without a word"
"""What a runtime does with a model that it cannot do."""


class Written(NamedTuple):
    """A model as a ``config.json`` says it.

    Attributes:
        family: whose class it is; of ``nemotron-nas`` the one that has the same layers.
        form: name of the form in which layers are said that differ; ``""`` is the stock class.
    """

    config: ModelConfig
    family: str
    form: str

    @property
    def kind(self) -> str:
        """What rules are of: a form's name, or a family's."""
        return self.form or self.family


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Models that a runtime cannot do.

    Attributes:
        of: names of the families (written as their stock class) and of the forms that it is about.
        what: those models in words, for the table in ``docs/serving.md``.
        then: what the runtime does.
        found: what of a layer (:meth:`ModelConfig.of_layer`), or with ``whole`` of a model, is so; ``""`` if nothing is.
    """

    of: tuple[str, ...]
    what: str
    then: str
    found: Callable[[ModelConfig], str]
    whole: bool = False

    def problem(self, config: ModelConfig) -> str:
        """What of a model is so, in words, with the layers' numbers where not all are like that; ``""`` if nothing is."""
        if self.whole or not config.differing:
            return self.found(config)
        words: dict[str, list[int]] = {}
        for layer in range(config.num_layers):
            if word := self.found(config.of_layer(layer)):
                words.setdefault(word, []).append(layer)
        return "; ".join(word + _where(layers, config.num_layers) for word, layers in words.items())


def _where(layers: list[int], number: int) -> str:
    if len(layers) == number:
        return ""
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return f" (layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers[:8]))}{more})"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A runtime.

    Attributes:
        title: its name, with the version that the rules were tried on.
        rules: everything that was found; what is in none of them it loads, with the logits of transformers.
    """

    title: str
    rules: tuple[Rule, ...]

    def problems(self, written: Written, *, of_layers: bool = False) -> list[str]:
        """What of a model it does not do, in words.

        Args:
            of_layers: look only at what single layers are.
        """
        rules = (rule for rule in self.rules if written.kind in rule.of and not (of_layers and rule.whole))
        return [f"{word}: {self.title} {rule.then}" for rule in rules if (word := rule.problem(written.config))]
