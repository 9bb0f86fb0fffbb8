"""What would make a step fit in a device's memory: the smallest change that does."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from typing import Callable, Iterator, NamedTuple

from megatron_prune.arch.sharding import legal_tensor_sizes
from megatron_prune.planning.needs import Setup, Step

MOST_COPIES = 64
"""Data-parallel copies that are tried, at most."""


class Change(NamedTuple):
    """A flag that takes no more devices; ``made`` gives back what it is given where there is nothing to change."""

    flag: str
    made: Callable[[Setup], Setup]


def _with_run(**fields: object) -> Callable[[Setup], Setup]:
    return lambda setup: replace(setup, run=replace(setup.run, **fields))


def _sequence_parallel(setup: Setup) -> Setup:
    divides = setup.layout.tensor > 1 and setup.run.seq_length % setup.layout.tensor == 0
    return _with_run(sequence_parallel=True)(setup) if divides else setup


_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OF_RECOVERY = (
    Change("--sequence-parallel", _sequence_parallel),
    Change("--recompute-granularity full", _with_run(**_FULL)),
    Change("--micro-batch-size 1", _with_run(micro_batch_size=1)),
)
OF_TEXT = (
    Change("--dtype bf16", lambda setup: replace(setup, width=2)),
    Change("--sample-length 256", lambda setup: replace(setup, sample_length=min(setup.sample_length, 256))),
)


def remedy(step: Step, setup: Setup, device_memory: int) -> str | None:
    """Flags with which a step fits: those that take the fewest devices, of these the fewest; ``None`` if nothing tried does."""
    changes = OF_RECOVERY if step.name == "recovery" else OF_TEXT
    fits = lambda setup: step.memory(setup).device <= device_memory
    for spread in _layouts(setup):
        if not fits(_changed(spread, changes)):
            continue
        for count in range(len(changes) + 1):
            for some in combinations(changes, count):
                if fits(_changed(spread, some)):
                    return ", ".join([*_flags(setup, spread), *(one.flag for one in some if one.made(spread) != spread)]) or None
    return None


def _changed(setup: Setup, changes: tuple[Change, ...]) -> Setup:
    for change in changes:
        setup = change.made(setup)
    return setup


def _layouts(setup: Setup) -> Iterator[Setup]:
    """The same on at least as many devices, by their number; of as many, those first that change least."""
    legal = lambda config: set(legal_tensor_sizes(config))
    tensor = sorted(size for size in legal(setup.config) & legal(setup.target) if size >= setup.layout.tensor)
    depths = (setup.config.num_layers, setup.target.num_layers)
    pipeline = [size for size in range(setup.layout.pipeline, min(depths) + 1) if not any(depth % size for depth in depths)]
    copies = [setup.data_parallel << power for power in range(8) if 1 << power <= MOST_COPIES]
    found = []
    for ranks, stages, data in product(tensor, pipeline, copies):
        layout = replace(setup.layout, tensor=ranks, pipeline=stages)
        run = replace(setup.run, data_parallel=data)
        found.append(replace(setup, layout=layout, data_parallel=data, run=run))
    changed = lambda other: len(_flags(setup, other))
    return iter(sorted(found, key=lambda other: (other.processes, changed(other), other.layout.pipeline)))


def _flags(old: Setup, new: Setup) -> list[str]:
    """What says how ``new`` is spread, where that is another way than ``old``."""
    sizes = lambda setup: {
        "--target-tensor-parallel-size": setup.layout.tensor,
        "--target-pipeline-parallel-size": setup.layout.pipeline,
        "--data-parallel-size": setup.data_parallel,
    }
    return [f"{flag} {size}" for flag, size in sizes(new).items() if size != sizes(old)[flag]]
