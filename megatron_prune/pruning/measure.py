"""What scoring and re-fitting share: the text, and the passes over it that metrics ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Protocol

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.config import option, require_positive
from megatron_prune.errors import InputError
from megatron_prune.files.documents import read_json
from megatron_prune.importance.artifact import load_calibration_file, save_calibration
from megatron_prune.importance.collect import collect
from megatron_prune.importance.metric import METRICS, Metric
from megatron_prune.importance.scoring import all_scores
from megatron_prune.importance.statistics import Statistics
from megatron_prune.opening.source import PARAM_DTYPES
from megatron_prune.planning.selection import Scores
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.stage import Stage
from megatron_prune.runtime.world import World
from megatron_prune.text.contents import summary
from megatron_prune.text.reader import stamps
from megatron_prune.text.sources import load_calibration, parse_data
from megatron_prune.text.tokens import Calibration

SEQ_LENGTH = 512
"""Tokens in a sample where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The text that a model is measured on, and what it is computed in."""

    data: tuple[str, ...] | None = option(
        "files of text, JSON, CSV or Parquet, folders, Megatron .bin/.idx, data set names, or self (own samples), each with "
        ":WEIGHT if wanted (default: self; named text is mixed half and half with self)",
        None,
    )
    data_field: str = option("name of the text in JSONL records and data sets", "text")
    nsamples: int = option("samples from each source", 128, least=1)
    seq_length: int | None = option(
        "tokens in a sample (default: 512, or the model's context where that is shorter)", None, least=2
    )
    seed: int = option("seed of all that is drawn: windows, own samples, the random metric", 1234)
    dtype: str = option("what to compute in", "fp32", choices=["fp32", "bf16", "fp16"])


class Runner(Protocol):
    """What runs the model: megatron-core under TP (``engines/megatron.py``), or transformers (``engines/huggingface.py``)."""

    def stage(self, *shapes: ModelConfig, dtype: torch.dtype, seq_length: int) -> Stage:
        """Where single layers of these shapes run; to be closed."""

    def sample(
        self,
        tensors: TensorMap,
        dtype: torch.dtype,
        *,
        count: int,
        length: int,
        seed: int,
        bos: int | None,
        progress: Callable[[int], None],
    ) -> torch.Tensor:
        """The model's own text, int64 [count, length], the same on every process."""

    def whole_model_passes(
        self, metrics: list[Metric], subject: Subject, calibration: Calibration, dtype: torch.dtype, world: World
    ) -> None:
        """Collect gradients and losses for the metrics that need them.

        Raises:
            InputError: if this runner cannot, or something is not finite.
        """


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured.

    Attributes:
        layout: the parallel layout of this run.
        runner: what runs it.
        content_id: its digest.
        tokenizer_dir: Hugging Face directory of the tokenizer, if there is one.
        bos: id of its BOS token, if it has one.
    """

    tensors: TensorMap
    layout: ParallelLayout
    content_id: str
    tokenizer_dir: Path | None
    bos: int | None
    runner: Runner

    @property
    def config(self) -> ModelConfig:
        return self.tensors.config


def bos_token(folder: Path | None) -> int | None:
    """``bos_token_id`` of a Hugging Face directory; ``None`` where it names none.

    Raises:
        CheckpointError: if its ``config.json`` is damaged.
    """
    config = folder / "config.json" if folder else None
    value = read_json(config).get("bos_token_id") if config and config.exists() else None
    return value if type(value) is int else None


def request_key(options: CalibrationOptions, subject: Subject, **more: object) -> str:
    """What an interrupted run must have been asked for to be gone on with."""
    fields = {name: getattr(options, name) for name in CalibrationOptions.__dataclass_fields__}
    fields["files"] = [stamps(spec.name) for spec in parse_data(options.data)]
    return json.dumps({**fields, **more, "content_id": subject.content_id}, sort_keys=True, default=str)


def check_dtype(options: CalibrationOptions, metrics: list[str]) -> None:
    """Refuse gradients in fp16, where small ones become zero.

    Raises:
        InputError: naming the metrics.
    """
    gradient = [name for name in metrics if "gradients" in METRICS.get(name).needs]
    if options.dtype == "fp16" and gradient:
        raise InputError(
            "gradients in fp16: small ones become zero there",
            got="metrics " + ", ".join(gradient),
            do="compute with --dtype bf16 or fp32, or use a metric that needs none (activation, wanda, obs)",
        )


def obtain_calibration(options: CalibrationOptions, subject: Subject, folder: Path, world: World) -> Calibration:
    """The tokens, from ``folder`` if they are kept there, else read (and sampled) and kept; the same on every process.

    Raises:
        InputError: if the data cannot be read, is too short or does not fit the model.
    """
    require_positive(options, "nsamples", "seq_length")
    kept = load_calibration_file(folder, subject.config)
    if all(world.all_gather(kept is not None)):
        return kept
    calibration = load_calibration(
        parse_data(options.data),
        tokenizer_dir=subject.tokenizer_dir,
        seq_length=sample_length(options, subject.config),
        nsamples=options.nsamples,
        seed=options.seed,
        max_position_embeddings=subject.config.max_position_embeddings,
        vocab_size=subject.config.vocab_size,
        field=options.data_field,
        self_samples=lambda count: own_samples(options, subject, count, world),
    )
    world.barrier()
    if world.is_main:
        for line in filter(None, (summary(source["name"], source) for source in calibration.provenance)):
            log.info("%s", line)
    world.on_main(lambda: save_calibration(folder, calibration))
    return calibration


def sample_length(options: CalibrationOptions, config: ModelConfig) -> int:
    """Tokens in a sample."""
    return min(SEQ_LENGTH, config.max_position_embeddings) if options.seq_length is None else options.seq_length


def own_samples(options: CalibrationOptions, subject: Subject, count: int, world: World) -> torch.Tensor:
    """Text that the model samples, int64 [count, seq_length]."""
    made, length = 0, sample_length(options, subject.config)
    with progress_bar("sampling", count * length, shown=world.is_main, unit="tokens") as advance:

        def progress(total: int) -> None:
            nonlocal made
            advance(total - made)
            made = total

        return subject.runner.sample(
            subject.tensors,
            PARAM_DTYPES[options.dtype],
            count=count,
            length=length,
            seed=options.seed,
            bos=subject.bos,
            progress=progress,
        )


def measure(
    metrics: list[str],
    moments: frozenset[str],
    options: CalibrationOptions,
    subject: Subject,
    calibration: Calibration,
    folder: Path,
    world: World,
) -> Statistics:
    """Run the passes that ``metrics`` need, leaving out what ``folder`` holds already.

    Args:
        moments: sites whose second moments are wanted.

    Raises:
        InputError: naming a layer or parameter where something is not finite.
    """
    kinds = [METRICS.get(name) for name in metrics]
    statistics = Statistics(folder=folder, config=subject.config)
    needs = frozenset().union(*(kind.needs for kind in kinds))
    dtype = PARAM_DTYPES[options.dtype]
    if moments or "activations" in needs:
        _forward_pass(moments, dtype, subject, calibration, statistics, world)
    if needs & {"gradients", "losses"}:
        found = [kind(statistics=statistics) for kind in kinds if kind.needs & {"gradients", "losses"}]
        subject.runner.whole_model_passes(found, subject, calibration, dtype, world)
    return statistics


def _forward_pass(
    moments: frozenset[str],
    dtype: torch.dtype,
    subject: Subject,
    calibration: Calibration,
    statistics: Statistics,
    world: World,
) -> None:
    stage = subject.runner.stage(subject.config, dtype=dtype, seq_length=calibration.tokens.shape[1])
    total = subject.config.num_layers * calibration.tokens[stage.copy :: stage.copies].numel()
    with progress_bar("measuring", total, shown=world.is_main, unit="tokens × layers") as advance:
        collect(subject.tensors, calibration, stage, statistics, moments, world, dtype=dtype, progress=advance)
    stage.close()


def scores_of(metrics: list[str], statistics: Statistics | None, seed: int, subject: Subject, world: World) -> dict[str, Scores]:
    """Every metric's scores of every axis it can score, full and the same on every process."""
    return {
        name: all_scores(METRICS.get(name)(seed=seed, statistics=statistics), subject.tensors, subject.layout, world)
        for name in metrics
    }
