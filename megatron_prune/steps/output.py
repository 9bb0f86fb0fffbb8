"""What every writing step does alike: check the output, stage it, stream tensors over all processes, put it in place."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

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
from megatron_prune.checkpoint.megatron_args import TRANSFORMER_IMPLS
from megatron_prune.checkpoint.stream import StreamReport, Transform, content_id, share, stream
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError
from megatron_prune.evaluation.one_layer import import_stock_class
from megatron_prune.families.family import Family
from megatron_prune.files import staging
from megatron_prune.files.failures import explained
from megatron_prune.runtime.world import World
from megatron_prune.steps.megatron_lm import say_flags
from megatron_prune.steps.overwrite import HUGGING_FACE, MEGATRON, Kind, check_replaceable
from megatron_prune.steps.written import check_huggingface, check_megatron
from megatron_prune.vocabulary.trimmed import Trimmed

log = logging.getLogger("megatron_prune")

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


def write_megatron(
    world: World,
    save: Path,
    source: Source,
    *,
    config: ModelConfig,
    layout: ParallelLayout,
    dtypes: dict[TensorId, torch.dtype],
    ckpt_format: str,
    transformer_impl: str = TRANSFORMER_IMPLS[0],
    manifest: Callable[[StreamReport], Manifest],
    side_files: Path | None,
    trimmed: Trimmed | None = None,
    buffers_of: HuggingFaceModel | None = None,
    sizes: dict[tuple[str, int], list[int]] | None = None,
    plan_text: str | None = None,
    beside: Mapping[Path, bytes] | None = None,
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
        beside: files that appear together with it.
        check: reopen it and compare before it is put in place.
    """

    def lay_out() -> None:
        folder = megatron.lay_out(
            partial,
            save,
            config,
            layout,
            dtypes,
            ckpt_format=ckpt_format,
            transformer_impl=transformer_impl,
            tokenizer=side_files is not None,
            sizes=sizes,
        )
        if side_files:
            (folder / megatron.HF_FOLDER).mkdir()
            huggingface.copy_side_files(side_files, folder / megatron.HF_FOLDER)
            if trimmed:
                trimmed.write(folder / megatron.HF_FOLDER)
        if buffers_of:
            huggingface.save_buffers(buffers_of, folder / megatron.HF_FOLDER)
        if plan_text:
            (folder / megatron.PLAN_FILE).write_text(plan_text, encoding="utf-8")

    output = Output(save, MEGATRON, needed=_bytes(config, dtypes, side_files), overwrite=overwrite, beside=beside or {})
    with staged(world, output) as partial:
        world.on_main(lay_out)
        folder = partial / megatron.RELEASE
        target = megatron.open_target(folder, config, layout, ckpt_format)
        report = run(world, source, target, label="writing", strict=strict)
        world.on_main(lambda: megatron.finish(folder, replace(manifest(report), digests=report.in_order(config))))
        if check:
            check_megatron(world, partial, config)
    if world.is_main and not (sizes and ckpt_format == "torch"):  # Megatron-LM reads no rank files of unequal size
        dtype = dtypes[TensorId("embedding")]
        say_flags(save, config, layout, dtype, ckpt_format=ckpt_format, transformer_impl=transformer_impl)


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
    beside: Mapping[Path, bytes] | None = None,
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
        beside: files that appear together with it.
        check: reopen it and compare before it is put in place.
    """

    def lay_out() -> None:
        if side_files:
            huggingface.copy_side_files(side_files, partial)
            for name in (huggingface.BUFFERS_FILE, RECIPE_FILE):  # of the weights that it lies beside
                (partial / name).unlink(missing_ok=True)
            if trimmed:
                trimmed.write(partial)
        described = hf_config
        if config_text is None:
            described = both_versions.describe(hf_config, config, commonest(dtypes))
            both_versions.rewrite_side_files(partial, config.vocab_size)
        huggingface.lay_out(
            partial,
            config,
            family,
            described,
            dtypes,
            max_shard_bytes=max_shard_bytes,
            tied_head_stored=tied_head_stored,
            buffers=buffers,
            config_text=config_text,
        )
        for name, text in (files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")

    output = Output(save, HUGGING_FACE, needed=_bytes(config, dtypes, side_files), overwrite=overwrite, beside=beside or {})
    with staged(world, output) as partial:
        world.on_main(lay_out)
        target = huggingface.open_model(partial).tensors
        # transformers takes two seconds to import; a thread that imports it too before that is over gets half of it.
        with ThreadPoolExecutor(1) as meanwhile:
            if check and world.is_main:
                meanwhile.submit(import_stock_class, family.name)
            report = run(world, source, target, label="writing", strict=strict)
        if recipe is not None:
            text = Recipe(recipe=recipe, digests=report.in_order(config)).dumps()
            world.on_main(lambda: (partial / RECIPE_FILE).write_text(text, encoding="utf-8"))
        if check:
            check_huggingface(world, partial, config, report)


def commonest(dtypes: dict[TensorId, torch.dtype]) -> torch.dtype:
    """The element type of most tensors: what a configuration names."""
    return Counter(dtypes.values()).most_common(1)[0][0]


@dataclass(frozen=True)
class Output:
    """What is being written.

    Attributes:
        save: the directory.
        kind: what it is going to be.
        needed: bytes that it takes.
        overwrite: whether it may replace an output that is there.
        beside: files that are put in place together with it.
    """

    save: Path
    kind: Kind
    needed: int = 0
    overwrite: bool = False
    beside: Mapping[Path, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def staged(world: World, output: Output) -> Iterator[Path]:
    """A partial output directory that is put in place at the end, with the files beside it, or removed on an error.

    Raises:
        InputError: if there is no room for it.
        PruneError: if the system refuses something on the way.
    """

    def begin() -> None:
        for place, needed in ((output.save, output.needed), *((path, len(data)) for path, data in output.beside.items())):
            staging.check_room(place, needed)
        staging.begin(output.save)

    def commit() -> None:
        if output.overwrite:
            known = {path.name for path in staging.partial_path(output.save).rglob("*")}
            check_replaceable(output.save, output.kind, known=known)  # it may have changed while we worked
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


def say_links(folder: Path, world: World) -> None:
    """Say which weights are read from elsewhere, and refuse what else is not the directory's own.

    Raises:
        InputError: naming a file beside the weights that is a link out of the directory, or no file.
    """
    for each in (folder, folder / megatron.HF_FOLDER):
        if huggingface.is_huggingface(each):
            huggingface.side_files(each)
    linked = huggingface.linked_weights(folder)
    if linked and world.is_main:
        log.info("weights that are links: %s", "; ".join(linked))


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


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, shown: bool, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar on standard error, on one process; it counts bytes, or what ``unit`` says."""
    amount = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _bytes(config: ModelConfig, dtypes: dict[TensorId, torch.dtype], side_files: Path | None) -> int:
    weights = sum(prod(tensor_shape(tensor.role, config)) * dtypes[tensor].itemsize for tensor in tensor_ids(config))
    return weights + sum(file.stat().st_size for file in huggingface.side_files(side_files).values()) if side_files else weights
