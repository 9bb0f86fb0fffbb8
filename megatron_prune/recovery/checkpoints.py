"""Checkpoints of a recovery: megatron-core's ``torch_dist`` files with the optimizer's state, written beside the training.

SAVE/latest_checkpointed_iteration.txt     the newest
SAVE/best → iter_0000200                   the one with the lowest held-out loss
SAVE/iter_0000200/                         a checkpoint as any other of this project, with the state of the optimizer

A checkpoint is written under a hidden name by a process of every rank (``writer.py``), while training goes on, and put in
place by one rename when every rank's part is there. Any TP × PP × DP reads it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Callable

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.adapter import adapter_digests
from megatron_prune.checkpoint.manifest import FILE, Manifest
from megatron_prune.checkpoint.megatron_args import megatron_args
from megatron_prune.checkpoint.stream import StreamReport, content_id, stream
from megatron_prune.errors import CheckpointError, InputError, PruneError
from megatron_prune.files import staging
from megatron_prune.recovery import reading, writer
from megatron_prune.recovery.extra_states import missing_extra_states
from megatron_prune.recovery.optimizer import allocate_state, load_state
from megatron_prune.recovery.trainer import Trainer, TrainingError
from megatron_prune.runtime import cpu
from megatron_prune.runtime.world import World

BEST = "best"
_FAILURES = (Exception, CheckpointException)  # torch's is no Exception
_CONTENT = {
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""How megatron-core lays the tensors out: stacked layers, as Megatron-LM 0.16 does; the optimizer's state tensor by tensor."""


@dataclass(eq=False)
class Checkpoints:
    """Those of one run.

    Args:
        root: the run's directory.
        keep: how many of the newest stay, beside the best.
        side_files: fills a checkpoint's directory with what goes along (tokenizer, plan).
        tokenizer: whether one is among these.
        needed: bytes of one checkpoint.
        check: read every checkpoint again before it is put in place, and keep digests of its weights
            and the content id of what was read; without that, and of adapters, the manifest keeps the id that it was given.
    """

    root: Path
    world: World
    trainer: Trainer
    keep: int
    side_files: Callable[[Path], None]
    tokenizer: bool
    needed: int
    check: bool = True
    _queue: AsyncCallsQueue = field(init=False, default_factory=AsyncCallsQueue)
    _writing: Path = field(init=False, default=Path())
    _writer: BaseProcess | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        filesystem_async._results_queue = writer.Report()  # its own would be another process, which can die as well

    def save(self, iteration: int, described: Manifest, *, best: bool) -> None:
        """Begin to write a checkpoint; :meth:`poll` or :meth:`finish` puts it in place.

        Args:
            described: its manifest; the last entry of the recipe is what :func:`position` gives back.
            best: whether no checkpoint of the run had a lower held-out loss.

        Raises:
            TrainingError: if the one before could not be written, or there is no room.
        """
        self.finish()
        folder = self._writing = self.root / iteration_name(iteration)
        error = None
        if self.world.is_main:
            try:
                staging.check_room(self.root, self.needed)
                staging.begin(folder)
            except (PruneError, OSError) as found:
                error = TrainingError(f"the checkpoint of iteration {iteration} cannot be written: {found}\n  {self._whole()}")
        self.world.agree(error)
        with cpu.stand_in():
            state = self._state(loading=False)
            state["model"] |= missing_extra_states(state["model"], described.model)
            args = megatron_args(described.model, described.layout, self.trainer.dtype, self._tokenizer(folder))
            consumed = described.recipe[-1]["consumed_samples"]
            args.iteration, args.consumed_train_samples, args.no_save_optim = iteration, consumed, False
            state |= {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
            try:
                request = dist_checkpointing.save(
                    state, str(staging.partial_path(folder)), async_sharded_save=True, content_metadata=_CONTENT
                )
                if request.async_fn:
                    request = request._replace(async_fn=partial(writer.write, request.async_fn.args[0]))
                request.finalize_fns.insert(0, self._see_writers)
                request.add_finalize_fn(lambda: self._commit(folder, described, best))
                self._queue.schedule_async_request(request)
                self._writer = self._queue.async_calls[-1].async_caller.process
            except _FAILURES as failed:  # what is written at once, or the start of the writers
                raise self._lost(failed) from failed

    def _tokenizer(self, folder: Path) -> str | None:
        """Where the tokenizer of a checkpoint will lie once it is in place."""
        return str(folder.absolute() / megatron.HF_FOLDER) if self.tokenizer else None

    def mark_best(self, iteration: int) -> None:
        """Let a checkpoint that is in place be the best."""
        error = None
        if self.world.is_main:
            try:
                _link(self.root / BEST, iteration_name(iteration))
            except OSError as found:
                error = TrainingError(f"{self.root / BEST} could not be written: {found}\n  {self._whole()}")
        self.world.agree(error)

    def poll(self) -> None:
        """Put a checkpoint in place whose parts are all written, if there is one."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if not self._queue.get_num_unfinalized_calls():
            return
        try:
            with cpu.stand_in():
                self._queue.maybe_finalize_async_calls(blocking=blocking)
        except TrainingError:
            self._abandon()
            raise
        except _FAILURES as error:  # whatever a writer failed with, wrapped by megatron-core
            raise self._lost(error) from error

    def _see_writers(self) -> None:
        """Raise on every rank how any rank's writer ended, if not well."""
        how = writer.ending(self._writer)
        name = f"{self._writing.name} could not be written: rank {self.world.rank}'s "
        self.world.agree(TrainingError(f"{name}{how}\n  {self._whole()}") if how else None)

    def _lost(self, error: BaseException) -> TrainingError:
        self._abandon()
        return TrainingError(f"a checkpoint could not be written: {_last_line(error)}\n  {self._whole()}")

    def _abandon(self) -> None:
        if self.world.is_main:
            staging.abandon(self._writing)

    def _commit(self, folder: Path, described: Manifest, best: bool) -> None:
        error, partial = None, staging.partial_path(folder)
        described = self._read_again(partial, described) if self.check else described
        if self.world.is_main:
            try:
                self.side_files(partial)
                megatron.write_manifest(partial, described)
                staging.commit(folder)
                staging.write_text(self.root / megatron.TRACKER, str(int(folder.name.removeprefix("iter_"))))
                if best:
                    _link(self.root / BEST, folder.name)
                self._rotate()
            except (PruneError, OSError) as found:
                error = TrainingError(f"{folder} could not be written: {found}\n  {self._whole()}")
        self.world.agree(error)

    def _read_again(self, partial: Path, described: Manifest) -> Manifest:
        """The manifest with the digests of the weights as they lie in the files, which every rank reads a share of.

        Raises:
            TrainingError: if they are not a model (or an adapter) of the shape that was to be written.
        """
        found, error = StreamReport(), None
        try:
            if described.adapter:
                found.stored = adapter_digests(partial) if self.world.is_main else {}
            else:
                tensors = megatron.open_target(partial, described.model, described.layout, "torch_dist")
                found = stream(tensors, None, rank=self.world.rank, ranks=self.world.size)
        except (InputError, OSError) as failed:
            error = TrainingError(f"the checkpoint that was just written cannot be read: {failed}\n  {self._whole()}")
        self.world.agree(error)
        for part in self.world.all_gather(found):
            found.merge(part)
        identity = content_id(found.digests) if found.digests else described.content_id
        return replace(described, digests=dict(sorted(found.stored.items())), content_id=identity)

    def _whole(self) -> str:
        """What is left, in words."""
        found = iterations(self.root)
        return f"whole: {', '.join(iteration_name(number) for number in found)}" if found else "no checkpoint was written before"

    def _rotate(self) -> None:
        best = os.readlink(self.root / BEST) if (self.root / BEST).is_symlink() else None
        for number in iterations(self.root)[: -self.keep]:
            if iteration_name(number) != best:
                gone = self.root / f".{iteration_name(number)}.removed"
                os.rename(self.root / iteration_name(number), gone)
                shutil.rmtree(gone, ignore_errors=True)

    def load(self, folder: Path) -> None:
        """Take model, optimizer and schedule from a checkpoint, whatever its parallel layout.

        Raises:
            CheckpointError: if megatron-core cannot read it, or it holds what is not proven harmless.
        """
        with cpu.stand_in():
            wanted = self._state(loading=True)
            try:
                state = reading.load(wanted, folder)
                self.trainer.load_state(state["model"])
                load_state(self.trainer.optimizer, state["optimizer"])
                self.trainer.schedule.load_state_dict(state["opt_param_scheduler"])
            except CheckpointError:
                raise
            except _FAILURES as error:  # what a damaged state can do to megatron-core
                raise _cause(error, folder) from None

    def _state(self, *, loading: bool) -> dict[str, Any]:
        """megatron-core's description of what this rank writes or wants."""
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        allocate_state(self.trainer.optimizer)
        model = self.trainer.sharded_state({**_CONTENT, **groups})
        optimizer = self.trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_CONTENT)
        return {"model": model, "optimizer": optimizer, "opt_param_scheduler": self.trainer.schedule.state_dict()}


def iteration_name(iteration: int) -> str:
    """Megatron's name of a checkpoint's directory."""
    return f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations whose checkpoints are whole, oldest first."""
    folders = [path.parent for path in root.glob(f"iter_*/{FILE}") if not path.parent.is_symlink()]
    return sorted(int(folder.name[5:]) for folder in folders if re.fullmatch(r"iter_[0-9]{7,12}", folder.name))


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint of a run, if there is one; the tracker may lag behind it by one."""
    found = iterations(root)
    return root / iteration_name(found[-1]) if found else None


def clean(root: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for path in [each for name in (".iter_*.partial*", ".iter_*.removed", f".{BEST}.partial") for each in root.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _link(place: Path, target: str) -> None:
    temporary = place.with_name(f".{place.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    os.replace(temporary, place)


def _cause(error: BaseException, folder: Path) -> CheckpointError:
    """What any rank found, where torch gathered it from all."""
    found = [each for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    own = [each for each in found if isinstance(each, CheckpointError)]
    return own[0] if own else CheckpointError(f"{folder} cannot be taken up", got=_last_line((found or [error])[0]))


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
