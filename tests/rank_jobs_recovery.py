"""What ranks run to train: plain functions of a module that spawned processes can import. Tensors travel as numpy."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
from contextlib import contextmanager
from functools import partial
from multiprocessing.managers import SyncManager
from typing import Any, Iterator
from unittest import mock

import numpy
import torch
from rank_jobs import _may_have_children, forget_groups

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.runtime.world import World


def losses(world: World, tp: int, vocab_size: int, case: dict[str, Any]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """``vocab_parallel_losses`` on this rank's columns → losses [3, tokens, batch], gradient of the logits' columns.

    Args:
        case: ``logits`` [tokens, batch, padded vocabulary], ``labels``, ``upstream`` [tokens, batch], ``dtype``, and
            ``teacher`` logits, or ``ids`` and ``log_probs``, with ``weight`` and ``temperature``.
    """
    from megatron_prune.recovery.loss import Distillation, TeacherLogits, TeacherTopK, vocab_parallel_losses
    from megatron_prune.runtime.model import start_parallel, stop_parallel

    start_parallel(ParallelLayout(tensor=tp), world)
    try:
        from megatron.core import parallel_state

        width = case["logits"].shape[-1] // tp
        first = width * parallel_state.get_tensor_model_parallel_rank()
        dtype = getattr(torch, case["dtype"])
        cut = lambda whole: torch.from_numpy(whole)[..., first : first + width].to(dtype).clone()
        teacher = None
        if "teacher" in case:
            teacher = TeacherLogits(logits=cut(case["teacher"]))
        elif "ids" in case:
            teacher = TeacherTopK(ids=torch.from_numpy(case["ids"]), log_probs=torch.from_numpy(case["log_probs"]).float())
        distillation = Distillation(weight=case["weight"], temperature=case["temperature"])
        leaf = cut(case["logits"]).requires_grad_()
        labels = torch.from_numpy(case["labels"])
        found = vocab_parallel_losses(leaf * 1.0, labels, vocab_size, teacher, distillation)
        found[0].backward(torch.from_numpy(case["upstream"]).float())
        return torch.stack(found).detach().numpy(), leaf.grad.float().numpy()
    finally:
        stop_parallel()
        forget_groups()


@contextmanager
def light() -> Iterator[None]:
    """What a run of ``recover`` costs beside its work is left out: plots, and a process that imports everything again.

    The process through which writers report is forked instead of spawned; those of ``tests/end_to_end`` that start a run
    from the command line have the real one.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_prune.recovery import checkpoints, history

    forked = partial(SyncManager, ctx=multiprocessing.get_context("fork"))
    daemonic = multiprocessing.current_process().daemon
    with (
        mock.patch.object(checkpoints, "SyncManager", lambda ctx: forked()),
        mock.patch.object(history.History, "plot", lambda self: None),
        _may_have_children() if daemonic else contextlib.nullcontext(),
    ):
        try:
            yield
        finally:
            filesystem_async._results_queue = None


def recover(world: World, options: dict[str, Any], events: dict[int, str] | None = None, on_rank: int = 0) -> int:
    """``steps/recover.py`` → its exit code.

    Args:
        events: number of a step → what happens before it, on one rank: ``"stop"`` (SIGTERM), ``"nan"`` (a weight is not a
            number), ``"full"`` (no file may be longer than 40 kB from here on, as on a full disk).
    """
    from megatron_prune.checkpoint import staging
    from megatron_prune.recovery.trainer import Trainer
    from megatron_prune.runtime.model import stop_parallel
    from megatron_prune.steps.recover import RecoverOptions
    from megatron_prune.steps.recover import recover as step

    train, done = Trainer.step, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watched(self, dataset, consumed, **rest):
        number = consumed // self.sizes.global_batch + 1
        done.append(number)
        what = (events or {}).get(number) if world.rank == on_rank else None
        if what == "stop":
            signal.raise_signal(signal.SIGTERM)
        elif what == "nan":
            next(self.running.module.parameters()).data.view(-1)[:].fill_(float("nan"))
        elif what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        return train(self, dataset, consumed, **rest)

    with mock.patch.object(Trainer, "step", watched), light():
        try:
            return step(RecoverOptions(**options), world)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            stop_parallel()
            if world.size > 1:
                forget_groups()
            for folder in list(staging._locks):
                staging._unlock(staging._locks.pop(folder))  # a run holds its directory for as long as its process lives
