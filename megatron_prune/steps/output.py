"""What every writing step does alike: check the output, stage it, stream tensors over all processes, put it in place."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId, tensor_ids, tensor_shape
from megatron_prune.checkpoint import both_versions, huggingface, megatron
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.checkpoint.manifest import RECIPE_FILE, Manifest, Recipe
from megatron_prune.checkpoint.stream import StreamReport, Transform, check_ends, content_id, share, stream
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.config import option
from megatron_prune.errors import CheckpointError, InputError, PruneError
from megatron_prune.evaluation.one_layer import check_in_transformers, import_stock_class
from megatron_prune.families.family import Family
from megatron_prune.files import staging
from megatron_prune.runtime.world import World
from megatron_prune.vocabulary.trimmed import Trimmed

log = logging.getLogger("megatron_prune")

PARAM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What every step that writes a model has."""

    no_check: bool = option(
        "leave out the check of what was written (it is reopened and compared before it is put in place)", False
    )


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


def write_megatron(
    world: World,
    save: Path,
    source: Source,
    *,
    config: ModelConfig,
    layout: ParallelLayout,
    dtypes: dict[TensorId, torch.dtype],
    ckpt_format: str,
    manifest: Callable[[StreamReport], Manifest],
    side_files: Path | None,
    trimmed: Trimmed | None = None,
    buffers_of: HuggingFaceModel | None = None,
    sizes: dict[tuple[str, int], list[int]] | None = None,
    plan_text: str | None = None,
    overwrite: bool = False,
    strict: bool = False,
    check: bool = True,
) -> None:
    """Write a Megatron checkpoint at ``save``; every process takes part.

    Args:
        manifest: makes the manifest from what all processes saw.
        side_files: directory whose configuration and tokenizer files go along.
        trimmed: the tokenizer that takes the place of theirs.
        buffers_of: the model whose stored rotary tables are kept, coming from Hugging Face.
        sizes: (axis, layer) → units of every rank, where shards are of unequal size.
        plan_text: the plan that made it.
        check: reopen it and compare before it is put in place.
    """
    with staged(world, save, needed=_bytes(config, dtypes), overwrite=overwrite) as partial:
        if world.is_main:
            folder = megatron.lay_out(partial, save, config, layout, dtypes, ckpt_format=ckpt_format, sizes=sizes)
            if side_files:
                (folder / megatron.HF_FOLDER).mkdir()
                huggingface.copy_side_files(side_files, folder / megatron.HF_FOLDER)
                if trimmed:
                    trimmed.write(folder / megatron.HF_FOLDER)
            if buffers_of:
                huggingface.save_buffers(buffers_of, folder / megatron.HF_FOLDER)
            if plan_text:
                (folder / megatron.PLAN_FILE).write_text(plan_text, encoding="utf-8")
        world.barrier()
        folder = partial / megatron.RELEASE
        target = megatron.open_target(folder, config, layout, ckpt_format)
        report = run(world, source, target, label="writing", strict=strict)
        if world.is_main:
            megatron.finish(folder, replace(manifest(report), digests=report.in_order(config)))
        world.barrier()
        if check:
            check_megatron(world, partial, config)


def write_huggingface(
    world: World,
    save: Path,
    source: Source,
    *,
    config: ModelConfig,
    family: Family,
    hf_config: dict,
    config_text: str | None,
    dtypes: dict[TensorId, torch.dtype],
    max_shard_bytes: int,
    side_files: Path | None,
    trimmed: Trimmed | None = None,
    tied_head_stored: bool = False,
    buffers: dict[str, torch.Tensor] | None = None,
    files: dict[str, str] | None = None,
    recipe: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    check: bool = True,
) -> None:
    """Write a Hugging Face directory at ``save``; every process takes part.

    Args:
        config_text: the exact text of ``config.json``, where the model is one that was read and is written back unchanged;
            a changed one is described so that transformers 4 and 5 read the same (``checkpoint/both_versions.py``).
        trimmed: the tokenizer that takes the place of that in ``side_files``.
        files: further text files by name (model card, plan).
        recipe: how the model came to be, kept beside it.
        check: reopen it and compare before it is put in place.
    """
    with staged(world, save, needed=_bytes(config, dtypes), overwrite=overwrite) as partial, ThreadPoolExecutor(1) as beside:
        if world.is_main:
            if check:
                beside.submit(import_stock_class, family.name)
            if side_files:
                huggingface.copy_side_files(side_files, partial)
                (partial / huggingface.BUFFERS_FILE).unlink(missing_ok=True)
                if trimmed:
                    trimmed.write(partial)
            if config_text is None:
                hf_config = both_versions.describe(hf_config, config, commonest(dtypes))
                both_versions.rewrite_side_files(partial, config.vocab_size)
            huggingface.lay_out(
                partial,
                config,
                family,
                hf_config,
                dtypes,
                max_shard_bytes=max_shard_bytes,
                tied_head_stored=tied_head_stored,
                buffers=buffers,
                config_text=config_text,
            )
            for name, text in (files or {}).items():
                (partial / name).write_text(text, encoding="utf-8")
        world.barrier()
        report = run(world, source, huggingface.open_model(partial).tensors, label="writing", strict=strict)
        if world.is_main and recipe is not None:
            text = Recipe(recipe=recipe, digests=report.in_order(config)).dumps()
            (partial / RECIPE_FILE).write_text(text, encoding="utf-8")
        world.barrier()
        if check:
            check_huggingface(world, partial, config, report)


def check_side_files(world: World, folder: Path, described: Manifest) -> None:
    """Warn of configuration and tokenizer files of a checkpoint that were edited: they are used as they are now.

    Raises:
        CheckpointError: on tensors beside the weights (rotary tables) that are not as they were written.
    """
    edited = megatron.edited_files(folder, described)
    if tables := [name for name in edited if Path(name).name == huggingface.BUFFERS_FILE]:
        raise CheckpointError(f"{folder / tables[0]}", got="other bytes than were written", do="restore it, or convert again")
    if edited and world.is_main:
        log.warning("%s: edited or removed since it was written, and used so: %s", folder, ", ".join(edited))


def check_megatron(world: World, partial: Path, config: ModelConfig) -> None:
    """Reopen a Megatron checkpoint that was just written, compare it with its manifest and say so; every process takes part.

    Raises:
        PruneError: if it is not what was to be written.
    """
    written = megatron.open_checkpoint(partial)
    problems = [*_read_again(world, written.tensors), *(f"{name}: other bytes" for name in written.edited_files())]
    if written.config != config:
        problems.append(f"its config is {written.config}, not {config}")
    _say_checked(world, problems, config, "its files and args fit")


def check_huggingface(world: World, partial: Path, config: ModelConfig, written: StreamReport) -> None:
    """Reopen a Hugging Face directory that was just written, compare it with what was written, run a layer of it in stock
    transformers and say so; every process takes part.

    Raises:
        PruneError: if it is not what was to be written, or transformers reads it otherwise.
    """
    model = huggingface.open_model(partial)
    model.tensors.expect(written.stored, partial)
    problems = _read_again(world, model.tensors)
    if model.config != config:
        problems.append(f"its config.json means {model.config}, not {config}")
    name = ""
    if world.is_main and not problems:
        name, found = check_in_transformers(model)
        problems += found if not written.troubled else []
    _say_checked(world, problems, config, f"{name} takes them and a layer of it computes")


def _read_again(world: World, tensors: TensorMap) -> list[str]:
    """What is wrong with tensors whose digests are known, over all processes."""
    return [problem for part in world.all_gather(check_ends(tensors, world.rank, world.size)) for problem in part]


def _say_checked(world: World, problems: list[str], config: ModelConfig, text: str) -> None:
    error = None
    if problems:
        lines = ["the check of what was written failed (--no-check leaves it out); nothing is put in place", *problems[:20]]
        error = PruneError("\n  ".join(lines))
    world.agree(error)
    if world.is_main:
        log.info("checked: %d tensors lie as they were written, %s", len(tensor_ids(config)), text)


def commonest(dtypes: dict[TensorId, torch.dtype]) -> torch.dtype:
    """The element type of most tensors: what a configuration names."""
    return Counter(dtypes.values()).most_common(1)[0][0]


@contextlib.contextmanager
def staged(world: World, save: Path, *, needed: int, overwrite: bool) -> Iterator[Path]:
    """A partial output directory that is put in place at the end, or removed on an error."""
    _check_room(save, needed)
    partial = staging.partial_path(save)
    error = None
    if world.is_main:
        try:
            staging.begin(save)
        except (InputError, OSError) as found:
            error = found
    world.agree(error)
    try:
        yield partial
        world.barrier()
        if world.is_main:
            staging.commit(save)
        world.barrier()
    except BaseException:
        if world.is_main:
            staging.abandon(save)
        raise


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
    with progress_bar(label, mine, shown=world.is_main) as advance:
        report = stream(
            source.tensors,
            target,
            origin=source.origin,
            transform=source.transform,
            rank=world.rank,
            ranks=world.size,
            progress=advance,
        )
    whole = StreamReport()
    for part in world.all_gather(report):
        whole.merge(part)
    return whole


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, shown: bool, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar on standard error, on one process; it counts bytes, or what ``unit`` says."""
    amount = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _bytes(config: ModelConfig, dtypes: dict[TensorId, torch.dtype]) -> int:
    return sum(prod(tensor_shape(tensor.role, config)) * dtypes[tensor].itemsize for tensor in tensor_ids(config))


def _check_room(save: Path, needed: int) -> None:
    parent = save.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"not enough room for {save}", got=f"{free / 1e9:.1f} GB free", needed=f"{needed / 1e9:.1f} GB")
