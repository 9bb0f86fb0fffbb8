"""Perplexity of a Megatron checkpoint, running under TP × PP × DP."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_prune.arch.tensors import parameter_count
from megatron_prune.config import option, require_positive
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.opening.foreign import ForeignOptions
from megatron_prune.opening.opened import open_megatron
from megatron_prune.opening.source import PARAM_DTYPES
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.text.contents import summary
from megatron_prune.text.windows import draw_windows


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ForeignOptions):
    """Measure perplexity of a Megatron checkpoint on a text."""

    load_dir: str = option("Megatron checkpoint: its root, or an iteration directory")
    data: str = option(
        "text file, .jsonl file, folder, prefix of a Megatron .bin/.idx pair, owner/name on the Hugging Face hub, or a known "
        "data set (wikitext2, ptb, c4 …; its evaluation split)"
    )
    data_field: str = option("name of the text in JSONL and data sets", "text")
    tokenizer: str | None = option("Hugging Face directory of the tokenizer (default: kept in the checkpoint)", None)
    seq_length: int = option("tokens in a window", 512)
    windows: int = option("windows from the start of the text, at most", 16)
    micro_batch_size: int = option("windows in a forward pass", 1)
    dtype: str = option("what to compute in", "fp32", choices=["fp32", "bf16", "fp16"])
    output: str | None = option("also write the result to this JSON file", None)
    tensor_model_parallel_size: int | None = option("tensor-parallel ranks (default: those of the checkpoint)", None)
    pipeline_model_parallel_size: int | None = option("pipeline stages (default: those of the checkpoint)", None)


def evaluate(options: EvaluateOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: if the text, the tokenizer or the layout does not fit, or the loss is not finite.
    """
    require_positive(options, "seq_length", "windows", "micro_batch_size")
    if options.seq_length < 2:
        raise InputError("--seq-length", got=options.seq_length, needed="at least 2: the first token is never predicted")
    if options.output:
        staging.check_file(Path(options.output))
    model = open_megatron(options.load_dir, world, options, tokenizer=options.tokenizer)
    layout = run_layout(model.layout, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    layout.check(model.config)
    if options.seq_length > model.config.max_position_embeddings:
        raise InputError(
            "--seq-length", got=options.seq_length, needed=f"at most the model's {model.config.max_position_embeddings}"
        )
    if model.tokenizer is None:
        raise InputError(f"{model.path} keeps no tokenizer", do="name one with --tokenizer")
    settings = {"seq_length": options.seq_length, "count": options.windows, "field": options.data_field, "leading": model.leading}
    drawn = draw_windows(options.data, model.tokenizer, **settings)
    windows = drawn.tokens
    if windows.max() >= model.config.vocab_size:
        raise InputError(
            "the tokenizer is not the model's", got=f"token {windows.max()}", needed=f"below {model.config.vocab_size}"
        )

    from megatron_prune.evaluation.perplexity import perplexity
    from megatron_prune.runtime.model import build_model, stop_parallel

    dtype: torch.dtype = PARAM_DTYPES[options.dtype]
    running = build_model(model.tensors, layout, world, dtype=dtype, seq_length=options.seq_length)
    value = perplexity(running, windows, world, micro_batch_size=options.micro_batch_size)
    stop_parallel()
    if not math.isfinite(value):
        raise InputError(
            f"the loss of {options.load_dir} on {options.data} is not finite (NaN or infinity)",
            do="look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32",
        )
    if world.is_main:
        result = {
            "checkpoint": str(options.load_dir),
            "perplexity": value,
            "text": str(options.data),
            **{name: value for name, value in drawn.facts.items() if name in ("split", "files", "passed_over")},
            "windows": len(windows),
            "seq_length": options.seq_length,
            "begins_with_bos": model.leading is not None,
            "dtype": options.dtype,
            "tensor_parallel": layout.tensor,
            "pipeline_parallel": layout.pipeline,
            "parameters": parameter_count(model.config),
        }
        if line := summary(str(options.data), drawn.facts):
            log.info("%s", line)
        log.info("perplexity %.3f over %d windows of %d tokens of %s", value, len(windows), options.seq_length, options.data)
        if options.output:
            staging.write_files({Path(options.output): json.dumps(result, indent=2).encode() + b"\n"})
