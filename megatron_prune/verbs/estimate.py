"""What ``estimate`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.options import DTYPES


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(ForeignOptions):
    """Say what steps would need in memory per rank and on disk, without reading weights."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune estimate meta-llama/Llama-3.1-8B --target-tensor-parallel-size 4 --num-layers-remain 24"
    }

    load: str = option(
        "Hugging Face directory, config.json, hub id, or Megatron checkpoint", group="model", former=("path",), positional=True
    )
    target_tensor_parallel_size: int = option("tensor-parallel ranks", 1)
    target_pipeline_parallel_size: int = option("pipeline stages", 1)
    data_parallel_size: int = option("data-parallel copies in scoring, re-fitting and recovery", 1)
    make_vocab_size_divisible_by: int = option("the padded vocabulary is a multiple of this × the tensor-parallel size", 128)
    target_params_dtype: str = option("element type of checkpoints and of recovery", "bf16", choices=DTYPES)
    hidden_size_remain: int | None = option("residual channels that stay", None, group="shape")
    ffn_hidden_size_remain: int | None = option("feed-forward channels that stay", None, group="shape")
    num_attention_heads_remain: int | None = option("query heads that stay", None, group="shape")
    num_query_groups_remain: int | None = option("KV groups that stay", None, group="shape")
    num_layers_remain: int | None = option("layers that stay", None, group="shape")
    layer_sizes: str | None = option("JSON file of sizes by layer, as that of prune", None, group="shape", exists=True)
    micro_batch_size: int = option("sequences in a forward pass of recovery", 1)
    seq_length: int = option("tokens in a sequence of recovery", 4096)
    nsamples: int = option("samples of calibration text, of all sources together", 256)
    sample_length: int | None = option(
        "tokens in a sample of calibration text (default: 512, or the model's context where that is shorter)", None, least=2
    )
    recompute: bool = option("recovery recomputes activations layer by layer", False)
    distill: bool = option("recovery is distilled from the unpruned model beside it", False)
    train_tokens: float = option("tokens of the recovery", 12e9, least=1)
    device_tflops: float = option("what a device can do at best, TFLOP/s (H100 in bf16: 989)", 989.0, least=1e-6)
    mfu: float = option("share of it that training reaches", 0.4, least=1e-6)
    json: bool = option("print JSON", False, group="run")
