"""What tensors are read from, and passes over them by all processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId, tensor_ids
from megatron_prune.checkpoint.stream import StreamReport, Transform, content_id, share, stream
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.world import World

PARAM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is read and how it becomes the target's tensors (see ``checkpoint/stream.py``)."""

    tensors: TensorMap
    origin: Callable[[TensorId], TensorId] = lambda tensor: tensor
    transform: Transform | None = None

    def dtypes(self, config: ModelConfig, dtype: str | None) -> dict[TensorId, torch.dtype]:
        """Element type of every target tensor: the one asked for, else as stored."""
        asked = PARAM_DTYPES[dtype] if dtype else None
        return {tensor: asked or self.tensors.dtype(self.origin(tensor)) for tensor in tensor_ids(config)}


def commonest(dtypes: dict[TensorId, torch.dtype]) -> torch.dtype:
    """The element type of most tensors: what a configuration names."""
    return Counter(dtypes.values()).most_common(1)[0][0]


def run(world: World, source: Source, target: TensorMap | None, *, label: str, strict: bool) -> StreamReport:
    """Stream all tensors over all processes; warn of values that are not sound, or refuse them.

    Raises:
        CheckpointError: if the source is not what was written there; if ``strict`` and there are values that are not sound.
    """
    report = observe(world, source, target, label=label)
    report.require_whole()
    known = source.tensors.content_id if source.transform is None else None
    if known is not None and content_id(report.digests) != known:
        raise unlike_content_id(known, content_id(report.digests))
    if report.troubled:
        listed = [f"{tensor} holds {trouble}" for tensor, trouble in sorted(report.troubled.items())]
        if strict:
            raise CheckpointError("the weights are not sound: " + "; ".join(listed[:20]), do="mend them, or leave out --strict")
        if world.is_main:
            for line in listed:
                log.warning("%s", line)
    return report


def unlike_content_id(known: str, found: str) -> CheckpointError:
    """What is said of damage in a checkpoint whose manifest has no digests of its tensors."""
    return CheckpointError(
        "the weights are not those that were written: their content id is another (the checkpoint was made by an earlier "
        "version, which kept no digests of single tensors: none can be named)",
        got=found,
        needed=known,
        do="make the checkpoint again",
    )


def observe(world: World, source: Source, target: TensorMap | None, *, label: str) -> StreamReport:
    """Stream all tensors over all processes: what all of them saw."""
    wanted = tensor_ids((target or source.tensors).config)
    weights = {tensor: source.tensors.nbytes(source.origin(tensor)) for tensor in wanted}
    mine = sum(weights[tensor] for tensor in share(weights, world.rank, world.size))
    report, error = StreamReport(), None
    with progress_bar(label, mine, shown=world.is_main) as advance:
        try:
            report = stream(
                source.tensors,
                target,
                origin=source.origin,
                transform=source.transform,
                rank=world.rank,
                ranks=world.size,
                progress=advance,
            )
        except Exception as found:
            error = found
    world.agree(error)
    whole = StreamReport()
    for part in world.all_gather(report):
        whole.merge(part)
    return whole
