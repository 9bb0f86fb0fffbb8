"""Every step of a pruning: what it takes of memory and disk, and what it does (``resources.py``, ``passes.py``, ``work.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, NamedTuple

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.axes.axis import AXES
from megatron_prune.planning.passes import (
    CONTEXT_BYTES,
    Memory,
    Text,
    gradient_memory,
    measuring_memory,
    probing_memory,
    refit_memory,
    sampling_memory,
)
from megatron_prune.planning.resources import (
    RUNTIME_BYTES,
    Training,
    saving_memory,
    streaming_memory,
    training_disk,
    training_memory,
    training_seconds,
    weight_bytes,
)
from megatron_prune.planning.work import (
    Work,
    gradient_work,
    measuring_work,
    probing_work,
    products,
    refit_work,
    sampling_work,
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A pruning, and how it is to run.

    Attributes:
        config, target: the model before and after.
        data_parallel: copies beside the layout's ranks.
        samples, sample_length: text that is measured on and re-fitted to.
        width: bytes of a number that this computes with.
        itemsize: bytes of a stored weight.
        passes: of joint fits over the text.
        fits: models that are fitted and compared.
        sites: what second moments are taken of (``"stream"``, or what is inside a block); ``None``: what the default metrics and a
            rotation want.
        run: how the recovery would run.
        train_tokens: of the recovery.
    """

    config: ModelConfig
    target: ModelConfig
    layout: ParallelLayout = ParallelLayout()
    data_parallel: int = 1
    samples: int = 128
    sample_length: int = 512
    width: int = 4
    itemsize: int = 2
    passes: int = 4
    fits: int = 1
    sites: frozenset[str] | None = None
    run: Training = Training()
    train_tokens: float = 0.0

    @property
    def processes(self) -> int:
        """Ranks of all copies."""
        return self.layout.tensor * self.layout.pipeline * self.data_parallel

    @property
    def text(self) -> Text:
        """As single layers see it, for which a stage is one more copy."""
        copies = self.layout.pipeline * self.data_parallel
        return Text(samples=self.samples, seq_length=self.sample_length, copies=copies, width=self.width)

    @property
    def moments(self) -> list[int]:
        """Features of the sites whose second moments are taken."""
        config, target = self.config, self.target
        if self.sites is not None:
            widths = {kind.inside: _widest(config, kind.inside_space) for kind in map(BLOCKS.get, config.blocks)}
            widths["stream"] = config.hidden_size
            return [widths[site] for site in sorted(self.sites & set(widths))]
        fewer = lambda axis: min(AXES.get(axis).count(target.of_layer(n)) for n in range(target.num_layers)) < _most(config, axis)
        heads = [_widest(config, "head")]
        stream = [config.hidden_size] if target.hidden_size < config.hidden_size else []
        return stream + (heads if fewer("head") or fewer("kv_head") else [])

    @property
    def drops_layers(self) -> bool:
        """Whether whole layers go."""
        return self.target.num_layers < self.config.num_layers


def _widest(config: ModelConfig, space: str) -> int:
    return max(config.of_layer(layer).size(space) for layer in range(config.num_layers))


def _most(config: ModelConfig, axis: str) -> int:
    return max(AXES.get(axis).count(config.of_layer(layer)) for layer in range(config.num_layers))


class Step(NamedTuple):
    """One step, as functions of the setup.

    Attributes:
        disk: bytes that it leaves there.
    """

    name: str
    memory: Callable[[Setup], Memory]
    work: Callable[[Setup], Work]
    disk: Callable[[Setup], int]


def _streaming(config: Callable[[Setup], ModelConfig], buffers: int = 1) -> Callable[[Setup], Memory]:
    def memory(setup: Setup) -> Memory:
        held = streaming_memory(config(setup), setup.itemsize, buffers=buffers)
        return Memory(device=0, first=held, others=held, alone=held)

    return memory


def recovery_memory(setup: Setup) -> Memory:
    """Training; on the host what saving takes, which on a CPU is there when the activations are not."""
    parts = training_memory(setup.target, setup.layout, setup.run)
    saving = saving_memory(setup.target, setup.layout, setup.run, bucket=None)
    beside = RUNTIME_BYTES + saving_memory(setup.target, setup.layout, setup.run)
    held = sum(parts.values()) - parts["activations"]
    return Memory(
        device=held - parts["process"] + parts["activations"] + CONTEXT_BYTES,
        first=beside,
        others=beside,
        alone=held + max(parts["activations"], saving),
    )


def recovery_work(setup: Setup) -> Work:
    """Operations of a rank over the whole recovery."""
    flops = training_seconds(setup.target, setup.run, tokens=setup.train_tokens, devices=setup.processes, flops=1.0)
    return products(flops, 2 if setup.run.mixed_precision else 4)


def _refit_work(setup: Setup) -> Work:
    once = refit_work(setup.config, setup.target, setup.layout, setup.text, setup.passes)
    return Work(*(setup.fits * amount for amount in once))


def _stored(config: ModelConfig, setup: Setup) -> int:
    return weight_bytes(config, setup.itemsize)


STEPS = (
    Step(
        "conversion",
        _streaming(lambda setup: setup.config),
        lambda setup: Work(disk=2 * _stored(setup.config, setup)),
        lambda setup: _stored(setup.config, setup),
    ),
    Step(
        "sampling text",
        lambda setup: sampling_memory(setup.config, setup.layout, setup.text),
        lambda setup: sampling_work(setup.config, setup.layout, setup.text, setup.data_parallel),
        lambda setup: 8 * setup.samples * setup.sample_length,
    ),
    Step(
        "measuring",
        lambda setup: measuring_memory(setup.config, setup.layout, setup.text, setup.moments, rows=setup.drops_layers),
        lambda setup: measuring_work(setup.config, setup.layout, setup.text, setup.moments),
        lambda setup: 8 * setup.config.num_layers * sum(width * width for width in setup.moments),
    ),
    Step(
        "scoring by gradients",
        lambda setup: gradient_memory(setup.config, setup.layout, setup.text),
        lambda setup: gradient_work(setup.config, setup.layout, setup.text, setup.data_parallel),
        lambda setup: 0,
    ),
    Step(
        "costs of blocks",
        lambda setup: probing_memory(setup.config, setup.layout, setup.text),
        lambda setup: probing_work(setup.config, setup.layout, setup.text),
        lambda setup: 0,
    ),
    Step(
        "re-fitting",
        lambda setup: refit_memory(setup.config, setup.target, setup.layout, setup.text),
        _refit_work,
        lambda setup: setup.fits * weight_bytes(setup.target, 4),
    ),
    Step(
        "cutting",
        _streaming(lambda setup: setup.config, buffers=2),
        lambda setup: Work(disk=weight_bytes(setup.target, 4) + _stored(setup.target, setup)),
        lambda setup: _stored(setup.target, setup),
    ),
    Step(
        "export",
        _streaming(lambda setup: setup.target),
        lambda setup: Work(disk=2 * _stored(setup.target, setup)),
        lambda setup: _stored(setup.target, setup),
    ),
    Step("recovery", recovery_memory, recovery_work, lambda setup: training_disk(setup.target, setup.run)),
)
"""In their order."""
