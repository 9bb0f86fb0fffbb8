"""A model with a smaller vocabulary: rows of its matrices, its tokenizer, and every id in its files."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import both_versions, huggingface, megatron
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.checkpoint.stream import content_id
from megatron_prune.checkpoint.tied_copy import check_tied_copy
from megatron_prune.config import option
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES
from megatron_prune.files import staging
from megatron_prune.files.region import Scratch
from megatron_prune.opening.foreign import noted, told
from megatron_prune.opening.side_files import check_side_files, say_links
from megatron_prune.opening.source import PARAM_DTYPES, Source, run
from megatron_prune.pruning.engines.huggingface import HuggingFaceRunner
from megatron_prune.pruning.engines.megatron import megatron_subject
from megatron_prune.pruning.measure import CalibrationOptions, Subject, bos_token, obtain_calibration, request_key
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.world import World
from megatron_prune.surgery.cut import Cut
from megatron_prune.surgery.fold_tokens import FoldedRows, changing_rows, fold_rows, hidden_states, respelled
from megatron_prune.vocabulary.choice import Chosen, choose, files_of, plan_of, show
from megatron_prune.vocabulary.opened import Model, open_subject
from megatron_prune.vocabulary.request import SelectOptions, check_select
from megatron_prune.vocabulary.selection import PRIOR
from megatron_prune.writing.check import CheckOptions
from megatron_prune.writing.cut import write_huggingface_cut, write_megatron_cut
from megatron_prune.writing.huggingface import parse_size
from megatron_prune.writing.output import Output, staged
from megatron_prune.writing.overwrite import HUGGING_FACE, MEGATRON, check_output


@dataclass(frozen=True, kw_only=True)
class VocabTrimOptions(CalibrationOptions, SelectOptions, CheckOptions):
    """Cut the vocabulary of a Hugging Face model, a Megatron checkpoint at its own TP × PP, or a tokenizer alone."""

    save_dir: str = option("directory to write: of the same kind")
    plan: str | None = option("keep the tokens of this plan (of megatron-prune vocab select)", None)
    fold: bool = option(
        "fit the head's rows on text (--data …) to take over what dropped tokens said (default: rows stay as they are)", False
    )
    tokenizer_only: bool = option("write the tokenizer alone, no weights", False)
    ckpt_format: str | None = option(
        "layout of a Megatron result (default: that of the source)", None, choices=["torch_dist", "torch"]
    )
    max_shard_size: str = option("split weight files of a Hugging Face result larger than this", "5GB")
    overwrite: bool = option("replace an existing output directory", False)
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False)


def vocab_trim(options: VocabTrimOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: if the model, the counts, the request or the output do not do; nothing is written.
    """
    save = Path(options.save_dir)
    check_select(options)
    parse_size(options.max_shard_size)
    chosen_otherwise = [*SelectOptions.CRITERIA, "multiple_of"]
    if options.plan and (options.prior != PRIOR or any(getattr(options, name) is not None for name in chosen_otherwise)):
        raise InputError("--plan and what else says which tokens stay", do="give one of the two")
    _check_fold(options)
    source = Path(options.load_dir) if Path(options.load_dir).exists() else None
    kind = MEGATRON if source and megatron.is_megatron(source) and not options.tokenizer_only else HUGGING_FACE
    if options.tokenizer:
        staging.check_output(save, overwrite=options.overwrite, source=Path(options.tokenizer))
    check_output(save, kind, overwrite=options.overwrite, source=source)
    _check_written(options, kind is MEGATRON)
    model = open_subject(options.load_dir, options.tokenizer, told(options))
    huggingface.side_files(model.vocabulary.folder)
    if model.layout:
        noted(model.checkpoint, world)
    if model.checkpoint is not None:
        say_links(model.checkpoint.path, world)
    chosen = choose(options, model, options.plan)
    if world.is_main:
        show(chosen)
    if model.checkpoint is None or options.tokenizer_only:
        _write_tokenizer(save, chosen, options, world)
    elif options.fold:
        with _folded(save, model, chosen, options, world) as rows:
            _write_model(save, model, chosen, options, world, rows)
    else:
        _write_model(save, model, chosen, options, world, None)
    if world.is_main:
        log.info("%d of %d tokens: %s", len(chosen.trimmed.rows), chosen.trimmed.vocabulary.rows, save)


def _check_written(options: VocabTrimOptions, to_megatron: bool) -> None:
    """Refuse what says how weights are written that are not."""
    if options.ckpt_format and not to_megatron:
        raise InputError("--ckpt-format has no effect: no Megatron checkpoint is written", do="leave it out")
    if (to_megatron or options.tokenizer_only) and options.max_shard_size != VocabTrimOptions.max_shard_size:
        raise InputError("--max-shard-size has no effect: no Hugging Face weights are written", do="leave it out")


def _write_tokenizer(save: Path, chosen: Chosen, options: VocabTrimOptions, world: World) -> None:
    beside = files_of(chosen, options)
    with staged(world, Output(save, HUGGING_FACE, overwrite=options.overwrite, beside=beside)) as partial:
        world.on_main(lambda: huggingface.copy_side_files(chosen.trimmed.vocabulary.folder, partial))
        world.on_main(lambda: chosen.trimmed.write(partial))
        world.on_main(lambda: both_versions.rewrite_side_files(partial, len(chosen.trimmed.rows)))


def _check_fold(options: VocabTrimOptions) -> None:
    """Refuse text that nothing would look at, and a fold of nothing.

    Raises:
        InputError: naming the options.
    """
    text = {name: item for name, item in CalibrationOptions.__dataclass_fields__.items() if name != "data_field"}
    idle = [f"--{name.replace('_', '-')}" for name, item in text.items() if getattr(options, name) != item.default]
    if idle and not options.fold:
        raise InputError(", ".join(idle) + " without --fold", do="leave it out, or pass --fold")
    if options.fold and options.tokenizer_only:
        raise InputError("--fold and --tokenizer-only", do="give one of the two")


@contextlib.contextmanager
def _folded(save: Path, model: Model, chosen: Chosen, options: VocabTrimOptions, world: World) -> Iterator[FoldedRows]:
    """The head's fitted rows; the text is kept beside ``save`` until that is written."""
    subject, dtype = _subject(model, options, world), PARAM_DTYPES[options.dtype]
    ids = chosen.trimmed.id_map
    key = request_key(options, subject, rows=hashlib.sha256(ids.new_to_old.tobytes()).hexdigest())
    with staging.work(save, key, main=world.is_main, agree=world.agree) as folder:
        calibration = respelled(obtain_calibration(options, subject, folder, world), ids)
        stage = subject.runner.stage(model.config, dtype=dtype, seq_length=calibration.tokens.shape[1])
        total = model.config.num_layers * calibration.tokens[stage.copy :: stage.copies].numel()
        with progress_bar("measuring", total, shown=world.is_main, unit="tokens × layers") as advance:
            hidden = hidden_states(subject.tensors, calibration, stage, world, dtype, advance)
        with progress_bar("folding", changing_rows(ids), shown=world.is_main, unit="rows") as advance:
            rows = fold_rows(subject.tensors, ids, hidden, stage, world, advance)
        stage.close()
        chosen.made_by["fold"] = {"rows": len(rows.tokens), "calibration": calibration.provenance}
        yield rows


def _subject(model: Model, options: VocabTrimOptions, world: World) -> Subject:
    """The model as what is measured."""
    folder, checkpoint = model.vocabulary.folder, model.checkpoint
    if isinstance(checkpoint, MegatronCheckpoint):
        layout = run_layout(checkpoint.layout, world, None, None)
        return megatron_subject(checkpoint, layout, options.tokenizer, world)
    if world.size > 1:
        raise InputError(
            "--fold of a Hugging Face model runs in one process", got=world.size, do="convert it, and trim the checkpoint"
        )
    runner = HuggingFaceRunner(checkpoint.path, checkpoint.family)
    digest = content_id(run(world, Source(tensors=checkpoint.tensors), None, label="digesting", strict=False).digests)
    return Subject(
        tensors=checkpoint.tensors,
        layout=ParallelLayout(),
        content_id=digest,
        tokenizer_dir=folder,
        bos=bos_token(checkpoint.path),
        runner=runner,
    )


def _write_model(
    save: Path, model: Model, chosen: Chosen, options: VocabTrimOptions, world: World, rows: FoldedRows | None
) -> None:
    plan, checkpoint = plan_of(chosen, model.config), model.checkpoint
    cut = Cut(plan, model.config)
    head = TensorId("embedding" if model.config.tie_embeddings else "output")  # tied: at both ends, so that it stays tied

    def transform(tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        return cut.transform(tensor, rows.put_into(data) if rows and tensor == head else data, scratch)

    source = Source(tensors=checkpoint.tensors, origin=cut.origin, transform=transform)
    common = {"trimmed": chosen.trimmed, "overwrite": options.overwrite, "strict": options.strict, "check": not options.no_check}
    common["beside"] = files_of(chosen, options)
    if isinstance(checkpoint, HuggingFaceModel):
        check_tied_copy(checkpoint)
        shard_bytes = parse_size(options.max_shard_size)
        write_huggingface_cut(save, checkpoint, checkpoint.family, plan, source, world, max_shard_bytes=shard_bytes, **common)
    else:
        check_side_files(world, checkpoint.path, checkpoint.manifest)
        family = FAMILIES.get(checkpoint.manifest.family)
        kind = options.ckpt_format
        write_megatron_cut(save, checkpoint, checkpoint.layout, family, plan, source, world, ckpt_format=kind, **common)
