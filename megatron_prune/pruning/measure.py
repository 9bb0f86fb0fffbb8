"""What scoring and re-fitting share: the text, and the passes over it that metrics ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.config import check_limits
from megatron_prune.errors import InputError
from megatron_prune.importance.artifact import load_calibration_file, save_calibration
from megatron_prune.importance.collect import collect
from megatron_prune.importance.metric import metric_named
from megatron_prune.importance.statistics import Statistics
from megatron_prune.importance.whole_units import check_shared
from megatron_prune.opening.opened import Opened
from megatron_prune.opening.source import PARAM_DTYPES
from megatron_prune.pruning.asked import sample_length
from megatron_prune.pruning.engines.engine import Engine
from megatron_prune.pruning.options import CalibrationOptions
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.world import World
from megatron_prune.text.contents import summary
from megatron_prune.text.data_specs import parse_data
from megatron_prune.text.encoder import Encoder
from megatron_prune.text.reader import stamps
from megatron_prune.text.sources import check_calibration, load_calibration
from megatron_prune.text.tokens import Calibration


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured.

    Attributes:
        engine: what runs it.
        tokenizer: directory of the tokenizer that text is read with, if there is one.
    """

    model: Opened
    engine: Engine
    tokenizer: Path | None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tensors(self) -> TensorMap:
        return self.model.tensors

    @property
    def layout(self) -> ParallelLayout:
        """How this run divides it."""
        return self.engine.layout

    @property
    def world(self) -> World:
        return self.model.world


def request_key(options: CalibrationOptions, subject: Subject, **more: object) -> str:
    """What an interrupted run must have been asked for to be gone on with."""
    fields = {name: getattr(options, name) for name in CalibrationOptions.__dataclass_fields__}
    fields["files"] = [stamps(spec.name) for spec in parse_data(options.data)]
    if subject.model.leading is not None:
        fields["leading"] = subject.model.leading
    return json.dumps({**fields, **more, "content_id": subject.model.identity}, sort_keys=True, default=str)


def check_measurable(options: CalibrationOptions, metrics: list[str], config: ModelConfig, layout: ParallelLayout) -> None:
    """Refuse gradients in fp16, where small ones become zero, and those of whole units that ranks of this layout share.

    Raises:
        InputError: naming the metrics.
    """
    for name in metrics:
        check_shared(metric_named(name), config, layout)
    gradient = [name for name in metrics if "gradients" in metric_named(name).needs]
    if options.dtype == "fp16" and gradient:
        raise InputError(
            "gradients in fp16: small ones become zero there",
            got="metrics " + ", ".join(gradient),
            do="compute with --dtype bf16 or fp32, or use a metric that needs none (activation, wanda, obs)",
        )


def check_text(options: CalibrationOptions, subject: Subject) -> None:
    """Refuse text that is not there, or samples that do not fit the model, before anything that takes time.

    Raises:
        InputError: naming what does not fit.
    """
    check_limits(options)
    check_calibration(
        parse_data(options.data),
        Encoder(subject.tokenizer),
        seq_length=sample_length(options, subject.config),
        nsamples=options.nsamples,
        seed=options.seed,
        max_position_embeddings=subject.config.max_position_embeddings,
        field=options.data_field,
    )


def obtain_calibration(options: CalibrationOptions, subject: Subject, folder: Path) -> Calibration:
    """The tokens, from ``folder`` if they are kept there, else read (and sampled) and kept; the same on every process.

    Raises:
        InputError: if the data cannot be read, is too short or does not fit the model.
    """
    kept, world = load_calibration_file(folder, subject.config), subject.world
    if all(world.all_gather(kept is not None)):
        return kept
    calibration = load_calibration(
        parse_data(options.data),
        tokenizer_dir=subject.tokenizer,
        seq_length=sample_length(options, subject.config),
        nsamples=options.nsamples,
        seed=options.seed,
        max_position_embeddings=subject.config.max_position_embeddings,
        vocab_size=subject.config.vocab_size,
        field=options.data_field,
        leading=subject.model.leading,
        self_samples=lambda count: own_samples(options, subject, count),
    )
    world.barrier()
    if world.is_main:
        for line in filter(None, (summary(source["name"], source) for source in calibration.provenance)):
            log.info("%s", line)
    world.on_main(lambda: save_calibration(folder, calibration))
    return calibration


def own_samples(options: CalibrationOptions, subject: Subject, count: int) -> torch.Tensor:
    """Text that the model samples, int64 [count, seq_length]."""
    made, length = 0, sample_length(options, subject.config)
    with progress_bar("sampling", count * length, shown=subject.world.is_main, unit="tokens") as advance:

        def progress(total: int) -> None:
            nonlocal made
            advance(total - made)
            made = total

        return subject.engine.sample(
            subject.tensors,
            PARAM_DTYPES[options.dtype],
            count=count,
            length=length,
            seed=options.seed,
            bos=subject.model.bos,
            progress=progress,
        )


def measure(
    metrics: list[str],
    moments: frozenset[str],
    options: CalibrationOptions,
    subject: Subject,
    calibration: Calibration,
    folder: Path,
) -> Statistics:
    """Run the passes that ``metrics`` need, leaving out what ``folder`` holds already.

    Args:
        moments: sites whose second moments are wanted.

    Raises:
        InputError: naming a layer or parameter where something is not finite.
    """
    statistics = Statistics(folder=folder, config=subject.config)
    found = [metric_named(name, statistics=statistics) for name in metrics]
    needs = frozenset().union(*(metric.needs for metric in found))
    dtype = PARAM_DTYPES[options.dtype]
    if moments or "activations" in needs:
        _forward_pass(moments, dtype, subject, calibration, statistics)
    if needs & {"gradients", "losses"}:
        passing = [metric for metric in found if metric.needs & {"gradients", "losses"}]
        subject.engine.whole_model_passes(passing, subject.tensors, calibration, dtype)
    return statistics


def _forward_pass(
    moments: frozenset[str],
    dtype: torch.dtype,
    subject: Subject,
    calibration: Calibration,
    statistics: Statistics,
) -> None:
    stage = subject.engine.stage(subject.config, dtype=dtype, seq_length=calibration.tokens.shape[1])
    total = subject.config.num_layers * calibration.tokens[stage.copy :: stage.copies].numel()
    with progress_bar("measuring", total, shown=subject.world.is_main, unit="tokens × layers") as advance:
        collect(subject.tensors, calibration, stage, statistics, moments, subject.world, dtype=dtype, progress=advance)
    stage.close()
