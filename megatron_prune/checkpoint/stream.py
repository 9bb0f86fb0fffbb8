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

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId, tensor_ids
from megatron_prune.checkpoint.options import WORKERS
from megatron_prune.checkpoint.tensor_map import DamagedTensor, TensorMap
from megatron_prune.errors import CheckpointError, raise_all
from megatron_prune.files.region import Scratch, closed_files, sync_files

Transform = Callable[[TensorId, torch.Tensor, Scratch], torch.Tensor]
"""(target tensor, full source tensor, buffers of this thread) → full target tensor."""


@dataclass
class StreamReport:
    """What a process saw of the tensors it handled.

    Attributes:
        digests: of every tensor's values, whatever the format; :func:`content_id` makes a model's identity of them.
        stored: of every tensor's bytes as they lie in the files that were written (read, where nothing was).
        troubled: which hold NaN, infinity or values too large.
        damaged: which of the source are not what was written there, with the message.
    """

    digests: dict[str, str] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    troubled: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    def merge(self, other: StreamReport) -> None:
        """Add what another process saw."""
        self.digests.update(other.digests)
        self.stored.update(other.stored)
        self.troubled.update(other.troubled)
        self.damaged.update(other.damaged)

    def in_order(self, config: ModelConfig) -> dict[str, str]:
        """``stored``, as the model has its tensors."""
        return {str(tensor): self.stored[str(tensor)] for tensor in tensor_ids(config)}

    def require_whole(self) -> None:
        """Refuse a source with damaged tensors.

        Raises:
            CheckpointError: naming them.
        """
        raise_all(
            CheckpointError,
            "the weights are not those that were written: damaged, exchanged with other files, or changed afterwards",
            [self.damaged[name] for name in sorted(self.damaged)],
            do="restore the files, or make the checkpoint again",
        )


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
        source: what is read, and compared with the digests that are known of it.
        target: what is written; ``None`` reads only (to check and to digest), copies that tensors have too.
        origin: target tensor → the source tensor it is made from.
        transform: what is done to it; the source unchanged (but for the target's dtype) when ``None``.
        rank, ranks: this process and their number.
        progress: called with the bytes read, after every tensor.

    Returns:
        Digests of the written tensors after ``transform`` and before a change of dtype (of the read ones, without a
        target), those of the bytes in the files, and which values are not sound. Nothing more is written after a damaged
        tensor of the source; without a target all are named.
    """
    wanted = tensor_ids((target or source).config)
    mine = share({tensor: source.nbytes(origin(tensor)) for tensor in wanted}, rank, ranks)
    report, thread = StreamReport(), local()

    def handle(tensor: TensorId) -> StreamReport:
        if not hasattr(thread, "scratch"):
            thread.scratch = Scratch()
        name, source_name, seen = str(tensor), str(origin(tensor)), StreamReport()
        try:
            data, stored = source.read_digested(origin(tensor), thread.scratch)
            if target is None:
                source.check_copies(tensor)
        except DamagedTensor as damaged:
            seen.damaged[source_name] = damaged.what
            return seen
        trouble = _trouble(data, target.dtype(tensor) if target else data.dtype)
        if trouble:
            seen.troubled[source_name] = trouble
        if transform is not None:
            data = transform(tensor, data, thread.scratch)
        seen.digests[name] = _digest(data)
        seen.stored[name] = target.write(tensor, data, thread.scratch) if target else stored
        return seen

    with closed_files(), ThreadPoolExecutor(WORKERS) as pool:
        jobs = {pool.submit(handle, tensor): tensor for tensor in mine}
        try:
            for job, tensor in jobs.items():
                report.merge(job.result())
                if report.damaged and target:
                    break
                progress(source.nbytes(origin(tensor)))
        finally:
            for job in jobs:
                job.cancel()
        sync_files()
    return report


def check_ends(tensors: TensorMap, rank: int, ranks: int) -> list[str]:
    """Read the ends of every part of this process's share of tensors again (``TensorMap.check_ends``); what is wrong."""
    problems = []
    with closed_files():
        for tensor in share({tensor: tensors.nbytes(tensor) for tensor in tensor_ids(tensors.config)}, rank, ranks):
            try:
                tensors.check_ends(tensor)
            except DamagedTensor as damaged:
                problems.append(damaged.what)
    return problems


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
