"""What ranks run to train: plain functions of a module that spawned processes can import. Tensors travel as numpy."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import numpy
import torch
from rank_jobs import _may_have_children, forget_groups

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.runtime.world import World


def losses(world: World, tp: int, vocab_size: int, cases: list[dict[str, Any]]) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """``vocab_parallel_losses`` on this rank's columns → by case: losses [3, tokens, batch], the columns' gradient.

    Args:
        cases: ``logits`` [tokens, batch, padded vocabulary], ``labels``, ``upstream`` [tokens, batch], ``dtype``, and
            ``teacher`` logits, or ``ids`` and ``log_probs``, with ``weight`` and ``temperature``.
    """
    from megatron_prune.runtime.model import start_parallel, stop_parallel

    start_parallel(ParallelLayout(tensor=tp), world)
    try:
        return [_losses(tp, vocab_size, case) for case in cases]
    finally:
        stop_parallel()
        forget_groups()


def _losses(tp: int, vocab_size: int, case: dict[str, Any]) -> tuple[numpy.ndarray, numpy.ndarray]:
    from megatron.core import parallel_state

    from megatron_prune.recovery.loss import Distillation, TeacherLogits, TeacherTopK, vocab_parallel_losses

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
    found = vocab_parallel_losses(leaf * 1.0, torch.from_numpy(case["labels"]), vocab_size, teacher, distillation)
    found[0].backward(torch.from_numpy(case["upstream"]).float())
    return torch.stack(found).detach().numpy(), leaf.grad.float().numpy()


def course(save: Path) -> dict[tuple[int, str], float]:
    """Every loss of a run's history, by iteration and kind (``loss``, ``held_out_loss``)."""
    records = [json.loads(line) for line in (save / "history.jsonl").read_text().splitlines()]
    return {(each["iteration"], kind): each[kind] for each in records for kind in ("loss", "held_out_loss") if kind in each}


class Killed(BaseException):
    """A run ends here as if it were killed: nothing after it is written or cleaned up."""


@contextmanager
def light(*, plots: bool = False) -> Iterator[None]:
    """What a run of ``recover`` costs beside its work is left out: plots, and looks through all objects for garbage."""
    from megatron_prune.recovery import history

    daemonic = multiprocessing.current_process().daemon
    with (
        contextlib.nullcontext() if plots else mock.patch.object(history.History, "plot", lambda self: None),
        mock.patch.object(gc, "collect", lambda *_: 0),
        _may_have_children() if daemonic else contextlib.nullcontext(),
    ):
        yield


@contextmanager
def happening(events: dict[int, str]) -> Iterator[None]:
    """Let things happen to a run at iterations.

    ``"stop"`` or ``"interrupt"``: SIGTERM or SIGINT during the step, so that the one after it is the last; ``"asked"``: the
    step begins with that. ``"nan"``: all weights are, before the step;
    ``"nan gradient"``: a gradient alone. ``"full"`` or ``"no room"``: from this checkpoint on no file may be longer than
    40 kB or 100 bytes, as on a full disk; ``"little room"``: the disk says so. ``"killed in …"`` (writing, commit, tracker,
    best, rotation): the run is gone at that moment of its checkpoint. ``"writer …"`` (killed, leaves, fails): the process
    that writes it is, ends or finds an error in the middle; with ``after a stop`` the run was asked to stop before.
    ``"indices do not fit"`` (at 0): the disk is full while the first of the data's indices is written.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_prune.checkpoint import megatron
    from megatron_prune.files import staging
    from megatron_prune.recovery import checkpoints
    from megatron_prune.recovery.trainer import Trainer

    train, save, limits = Trainer.step, checkpoints.Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    commit, write_text, link, rmtree = staging.commit, staging.write_text, checkpoints._link, checkpoints.shutil.rmtree
    write_file = FileSystemWriterAsync.write_preloaded_data
    now: list[str] = []

    def watched_step(self, dataset, consumed, **rest):
        what = events.get(consumed // self.sizes.global_batch + 1)
        parameters = list(self.running.module.parameters())
        if what in ("stop", "interrupt"):
            signal.raise_signal(signal.SIGTERM if what == "stop" else signal.SIGINT)
        elif what == "asked":
            rest = {**rest, "stop": True}
        elif what == "nan":
            for parameter in parameters:
                parameter.data.fill_(float("nan"))
        elif what == "nan gradient":
            parameters[-1].register_hook(lambda gradient: gradient * float("nan"))
        return train(self, dataset, consumed, **rest)

    def watched_save(self, iteration, *rest, **further):
        self.finish()
        now[:] = [events.get(iteration, "")]
        if now[0] in ("full", "no room"):
            resource.setrlimit(resource.RLIMIT_FSIZE, ({"full": 40_000, "no room": 100}[now[0]], limits[1]))
        if now[0] == "little room":
            self.needed = 1 << 60
        if now[0].endswith("after a stop"):
            signal.raise_signal(signal.SIGTERM)
        save(self, iteration, *rest, **further)
        if now[0].startswith("killed in"):
            self._queue.async_calls[0].async_caller.process.join()  # what a killed run leaves writing ends sooner or later
            if now[0] == "killed in writing":
                raise Killed
            self.finish()

    def watched_indices(path, array, **rest):
        with open(path, "wb") as file:
            file.write(array.tobytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device", path)

    def watched_write(*arguments):
        write_file(*arguments)
        if now and now[0].startswith("writer killed"):
            signal.raise_signal(signal.SIGKILL)
        elif now == ["writer leaves"]:
            os._exit(3)
        elif now == ["writer fails"]:
            raise ImportError("No module named 'psutil'")

    def at(moment, function):
        def watched(*arguments, **further):
            ours = moment != "tracker" or arguments[0].name == megatron.TRACKER
            ours = ours and (moment != "rotation" or str(arguments[0]).endswith(".removed"))
            if ours and now == [f"killed in {moment}"]:
                raise Killed
            return function(*arguments, **further)

        return watched

    with (
        mock.patch.object(Trainer, "step", watched_step),
        mock.patch.object(checkpoints.Checkpoints, "save", watched_save),
        mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(watched_write)),
        mock.patch.object(numpy, "save", watched_indices) if events.get(0) else contextlib.nullcontext(),
        mock.patch.object(staging, "commit", at("commit", commit)),
        mock.patch.object(staging, "write_text", at("tracker", write_text)),
        mock.patch.object(checkpoints, "_link", at("best", link)),
        mock.patch.object(checkpoints.shutil, "rmtree", at("rotation", rmtree)),
    ):
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def recover(
    world: World, options: dict[str, Any], events: dict[int, str] | None = None, on_rank: int = 0, *, plots: bool = False
) -> int:
    """``steps/recover.py`` → its exit code; ``events`` happen on one rank (see :func:`happening`)."""
    from megatron_prune.files import hidden
    from megatron_prune.recovery.trainer import Trainer
    from megatron_prune.runtime.model import stop_parallel
    from megatron_prune.steps.recover import RecoverOptions
    from megatron_prune.steps.recover import recover as step

    begin, trainers = Trainer.__post_init__, []

    def seen(self) -> None:
        trainers.append(self)
        begin(self)

    with (
        happening((events or {}) if world.rank == on_rank else {}),
        light(plots=plots),
        mock.patch.object(Trainer, "__post_init__", seen),
    ):
        try:
            return step(RecoverOptions(**options), world)
        finally:
            while trainers:
                _let_go(trainers.pop())
            stop_parallel()
            if world.size > 1:
                forget_groups()
            for folder in list(hidden.locks):
                hidden.unlock(hidden.locks.pop(folder))  # a run holds its directory for as long as its process lives


def teach(world: World, options: dict[str, Any]) -> None:
    """``steps/teach.py``."""
    from megatron_prune.steps.teach import TeachOptions
    from megatron_prune.steps.teach import teach as step

    step(TeachOptions(**options), world)
    if world.size > 1:
        forget_groups()


def _let_go(trainer: Any) -> None:
    """Break the circles through which a model keeps itself, and the threads of its process groups: they go through C++
    (hooks of gradients), where Python's garbage collection does not look. A run from the command line ends with its process.
    """
    config = trainer.running.module.config
    config.grad_scale_func = config.no_sync_func = config.finalize_model_grads_func = None
    trainer.running.module.__dict__.pop("compute_language_model_loss", None)
    if hasattr(trainer, "model"):
        trainer.model.grad_accs.clear()
