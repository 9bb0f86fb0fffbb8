"""An output directory on its way: made beside its place, put there when it is whole, removed on an error."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Iterator, Mapping

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId, full_shape, tensor_ids
from megatron_prune.checkpoint import huggingface
from megatron_prune.files import staging
from megatron_prune.files.failures import explained
from megatron_prune.runtime.world import World
from megatron_prune.writing.overwrite import Kind, check_replaceable


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a result is written, and under which conditions.

    Attributes:
        save: the directory.
        beside: files that are put in place together with it.
        overwrite: whether it may replace an output that is there.
        strict: whether values that are not sound are refused, instead of warned of.
        check: whether it is reopened and compared before it is put in place.
    """

    save: Path
    beside: Mapping[Path, bytes] = field(default_factory=dict)
    overwrite: bool = False
    strict: bool = False
    check: bool = True


@contextlib.contextmanager
def staged(world: World, output: Output, kind: Kind, needed: int = 0) -> Iterator[Path]:
    """A partial output directory that is put in place at the end, with the files beside it, or removed on an error.

    Args:
        kind: what it is going to be.
        needed: bytes that it takes.

    Raises:
        InputError: if there is no room for it.
        PruneError: if the system refuses something on the way.
    """

    def begin() -> None:
        for place, size in ((output.save, needed), *((path, len(data)) for path, data in output.beside.items())):
            staging.check_room(place, size)
        staging.begin(output.save)

    def commit() -> None:
        if output.overwrite:
            known = {path.name for path in staging.partial_path(output.save).rglob("*")}
            check_replaceable(output.save, kind, known=known)  # it may have changed while we worked
        staging.commit(output.save, output.beside)

    with explained(output.save):
        world.on_main(begin)
        try:
            yield staging.partial_path(output.save)
            world.on_main(commit)
        except BaseException:
            if world.is_main:
                staging.abandon(output.save)
            raise


def bytes_of(config: ModelConfig, dtypes: dict[TensorId, torch.dtype], side_files: Path | None) -> int:
    weights = sum(prod(full_shape(tensor, config)) * dtypes[tensor].itemsize for tensor in tensor_ids(config))
    return weights + sum(file.stat().st_size for file in huggingface.side_files(side_files).values()) if side_files else weights
