"""The one loop behind conversion, export, change of layout and pruning: read a role tensor, change it, write it.

Tensors are dealt over the processes by size; in each process two threads keep reading and writing at once. Memory is a
few times the largest tensor, whatever the model's size.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import local
from typing import Callable

import torch
import xxhash

from megatron_prune.arch.tensors import TensorId, tensor_ids
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.files.region import Scratch, closed_files, sync_files

WORKERS = 2

Transform = Callable[[TensorId, torch.Tensor, Scratch], torch.Tensor]
"""(target tensor, full source tensor, buffers of this thread) → full target tensor."""


@dataclass
class StreamReport:
    """What a process saw: digests of the tensors it handled, and which hold NaN, infinity or values too large."""

    digests: dict[str, str] = field(default_factory=dict)
    troubled: dict[str, str] = field(default_factory=dict)

    def merge(self, other: StreamReport) -> None:
        """Add what another process saw."""
        self.digests.update(other.digests)
        self.troubled.update(other.troubled)


def share(weights: dict[TensorId, int], rank: int, ranks: int) -> list[TensorId]:
    """Tensors that ``rank`` of ``ranks`` handles: the largest first, each to the least loaded."""
    load, mine = [0] * ranks, []
    for tensor in sorted(weights, key=lambda t: (-weights[t], str(t))):
        least = load.index(min(load))
        load[least] += weights[tensor]
        if least == rank:
            mine.append(tensor)
    return mine


def stream(
    source: TensorMap,
    target: TensorMap | None,
    *,
    origin: Callable[[TensorId], TensorId] = lambda tensor: tensor,
    transform: Transform | None = None,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> StreamReport:
    """Write every tensor of ``target`` that falls to this process.

    Args:
        source: what is read.
        target: what is written; ``None`` reads only (to check and to digest).
        origin: target tensor → the source tensor it is made from.
        transform: what is done to it; the source unchanged (but for the target's dtype) when ``None``.
        rank, ranks: this process and their number.
        progress: called with the bytes read, after every tensor.

    Returns:
        Digests of the written tensors after ``transform`` and before a change of dtype (of the read ones, without a
        target), and which values are not sound.
    """
    wanted = tensor_ids((target or source).config)
    mine = share({tensor: source.nbytes(origin(tensor)) for tensor in wanted}, rank, ranks)
    report, thread = StreamReport(), local()

    def handle(tensor: TensorId) -> tuple[TensorId, str, str | None, int]:
        if not hasattr(thread, "scratch"):
            thread.scratch = Scratch()
        data = source.read(origin(tensor), thread.scratch)
        trouble = _trouble(data, target.dtype(tensor) if target else data.dtype)
        if transform is not None:
            data = transform(tensor, data, thread.scratch)
        digest = _digest(data)
        if target is not None:
            target.write(tensor, data, thread.scratch)
        return tensor, digest, trouble, source.nbytes(origin(tensor))

    with closed_files(), ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(handle, tensor) for tensor in mine]
        try:
            for job in jobs:
                tensor, digest, trouble, count = job.result()
                report.digests[str(tensor)] = digest
                if trouble:
                    report.troubled[str(origin(tensor))] = trouble
                progress(count)
        finally:
            for job in jobs:
                job.cancel()
        sync_files()
    return report


def content_id(digests: dict[str, str]) -> str:
    """One digest of a whole model from the digests of its role tensors.

    It depends on values, dtype and shape of the role tensors and on nothing else: every format and parallel layout of
    one model in one dtype has the same.
    """
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return "xxh3-sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _digest(data: torch.Tensor) -> str:
    data = data.contiguous()
    head = f"{tuple(data.shape)} {data.dtype} ".encode()
    state = xxhash.xxh3_128(head)
    state.update(memoryview(data.view(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


def _trouble(data: torch.Tensor, target: torch.dtype) -> str | None:
    low, high = torch.aminmax(data)  # a NaN anywhere makes both NaN; one pass, no temporary
    if torch.isnan(low):
        return "NaN"
    largest = max(abs(low.item()), abs(high.item()))
    if largest == float("inf"):
        return "infinity"
    return f"{largest:g}, too large for {target}" if largest > torch.finfo(target).max else None
