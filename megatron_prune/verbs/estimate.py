"""What ``estimate`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.pruning.options import CostOptions, DivisionOptions
from megatron_prune.recovery.options import PassOptions
from megatron_prune.runtime.options import DTYPES


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """How fast and how large devices and disks are."""

    device_memory: str | None = option("memory of a device, such as 80GiB: what does not fit, and what would", None, group="run")
    device_tflops: float = option(
        "what a device can do at best in bf16 and fp16, TFLOP/s (H100: 989)", 989.0, above=0, group="run"
    )
    device_tflops_full: float = option("the same in float32 and float64 (H100: 67)", 67.0, above=0, group="run")
    device_bandwidth: float = option("what a device reads of its memory, TB/s (H100: 3.35)", 3.35, above=0, group="run")
    mfu: float = option("share of a device's best rate that is reached", 0.4, above=0, most=1, group="run")
    disk_bandwidth: float = option(
        "what all processes together read and write of the disk, GB/s (1: a network file system)", 1.0, above=0, group="run"
    )


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(CostOptions, DivisionOptions, ForeignOptions, PassOptions, RateOptions):
    """Say what steps would need of memory, disk and time, without reading weights; flags of prune and of recover mean the same here."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune estimate meta-llama/Llama-3.1-8B --target-tensor-parallel-size 4 --num-layers-remain 24 "
        "--device-memory 80GiB",
        "shape": "--num-layers-remain 24, or a budget: --ratio 0.25 --multiple-of hidden=64,ffn=128 --serve vllm,tp=4",
        "run": "--bf16 --device-memory 80GiB --disk-bandwidth 3",
    }

    load: str = option(
        "Hugging Face directory, config.json, hub id, or Megatron checkpoint", group="model", former=("path",), positional=True
    )
    target_tensor_parallel_size: int = option("tensor-parallel ranks", 1, least=1, former=("tensor_model_parallel_size",))
    target_pipeline_parallel_size: int = option("pipeline stages", 1, least=1, former=("pipeline_model_parallel_size",))
    data_parallel_size: int = option("data-parallel copies in scoring, re-fitting and recovery", 1, least=1)
    make_vocab_size_divisible_by: int = option(
        "the padded vocabulary is a multiple of this × the tensor-parallel size", 128, least=1
    )
    target_params_dtype: str = option("element type of checkpoints", "bf16", choices=DTYPES)
    sample_length: int | None = option(
        "tokens in a sample of calibration text: prune's --seq-length (default: 512, or the model's context where that is shorter)",
        None,
        least=2,
        group="text",
    )
    distill: bool = option("recovery is distilled from the unpruned model beside it", False)
    train_tokens: str = option("tokens of the recovery, such as 12B", "12B")
    json: bool = option("print JSON", False, group="run")
