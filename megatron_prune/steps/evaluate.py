"""Perplexity of a model of either kind, running under TP × PP × DP; a Hugging Face directory is read as shards of so many ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.config import check_limits
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.opening.opened import open_to_run
from megatron_prune.opening.source import PARAM_DTYPES
from megatron_prune.planning.amounts import SEQ_LENGTH
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.text.contents import summary
from megatron_prune.text.windows import draw_windows
from megatron_prune.verbs.evaluate import EvaluateOptions


def evaluate(options: EvaluateOptions, world: World) -> dict[str, Any]:
    """Run the step; every process takes part.

    Returns:
        The facts, ``perplexity`` among them, that ``--output`` keeps; the same on every process.

    Raises:
        InputError: if the text, the tokenizer or the layout does not fit, or the loss is not finite.
    """
    check_limits(options)
    if options.seq_length is not None and options.seq_length < 2:
        raise InputError("--seq-length", got=options.seq_length, needed="at least 2: the first token is never predicted")
    if options.output:
        staging.check_file(Path(options.output))
    model = open_to_run(options.load, world, options, tokenizer=options.tokenizer)
    stored = model.layout or ParallelLayout(tensor=world.size // (options.pipeline_model_parallel_size or 1) or 1)
    layout = run_layout(stored, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    layout.check(model.config)
    context = model.config.max_position_embeddings
    length = min(SEQ_LENGTH, context) if options.seq_length is None else options.seq_length
    if length > context:
        raise InputError("--seq-length", got=length, needed=f"at most the model's {context}")
    if model.tokenizer is None:
        raise InputError(f"{model.path} keeps no tokenizer", do="name one with --tokenizer")
    settings = {"seq_length": length, "count": options.windows, "field": options.data_field, "leading": model.leading}
    drawn = draw_windows(options.data, model.tokenizer, **settings)
    windows = drawn.tokens
    if windows.max() >= model.config.vocab_size:
        raise InputError(
            "the tokenizer is not the model's", got=f"token {windows.max()}", needed=f"below {model.config.vocab_size}"
        )

    identity = model.identity if options.output else model.recorded_identity  # every process reads: before the model runs
    from megatron_prune.evaluation.perplexity import perplexity
    from megatron_prune.runtime.model import build_model, stop_parallel

    dtype: torch.dtype = PARAM_DTYPES[options.dtype]
    running = build_model(model.tensors, layout, world, dtype=dtype, seq_length=length)
    value = perplexity(running, windows, world, micro_batch_size=options.micro_batch_size)
    stop_parallel()
    if not math.isfinite(value):
        raise InputError(
            f"the loss of {options.load} on {options.data} is not finite (NaN or infinity)",
            do="look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32",
        )
    result = {
        "checkpoint": options.checkpoint or str(options.load),
        "content_id": identity,
        "perplexity": value,
        "text": options.text or str(options.data),
        **{name: value for name, value in drawn.facts.items() if name in ("split", "files", "passed_over")},
        "windows": len(windows),
        "seq_length": length,
        "begins_with_bos": model.leading is not None,
        "dtype": options.dtype,
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": layout.pipeline,
        "parameters": parameter_count(model.config),
    }
    if world.is_main:
        if line := summary(str(options.data), drawn.facts):
            log.info("%s", line)
        log.info("perplexity %.3f over %d windows of %d tokens of %s", value, len(windows), length, options.data)
        if options.output:
            staging.write_files({Path(options.output): json.dumps(result, indent=2).encode() + b"\n"})
    return result
