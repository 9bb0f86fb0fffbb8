"""What Megatron-LM must be told on its command line to run a checkpoint of ours as the model that it is.

With ``--use-checkpoint-args`` it takes over what ``load_args_from_checkpoint`` (``megatron/training/checkpointing.py``, core 0.12
to 0.19) lists of the stored ``args``: sizes, rotary base, normalization, biases, tying, vocabulary, tokenizer. The rest of what
changes the model it leaves at its defaults, and some of that it can only compute in one way.
"""

from __future__ import annotations

import torch

from megatron_prune.arch.model import ModelConfig, RopeScaling
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.options import TRANSFORMER_IMPLS

_DTYPES = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}
_LLAMA3 = RopeScaling(kind="llama3", factor=8.0)
"""The one scaling that Megatron-LM's models compute: ``pretrain_gpt.py`` hands ``--rope-scaling-factor`` on to none of them."""


def megatron_lm_flags(
    config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, *, ckpt_format: str, transformer_impl: str
) -> list[str]:
    """The words to put after ``--load DIRECTORY``, ``--use-checkpoint-args`` first.

    Args:
        layout: of the checkpoint; the legacy format loads in no other.
        dtype: of its weights.
    """
    flags = ["--use-checkpoint-args", "--norm-epsilon", repr(config.norm_epsilon), *_DTYPES.get(dtype, [])]
    if config.qk_norm:
        flags.append("--qk-layernorm")
    scaling = config.rope_scaling
    if scaling and scaling.kind == "llama3":
        flags += ["--use-rope-scaling", "--rope-scaling-factor", repr(scaling.factor)]
    if scaling and scaling.kind == "linear" and float(scaling.factor).is_integer():
        flags += ["--rotary-seq-len-interpolation-factor", str(int(scaling.factor))]
    if config.sliding_window is not None:
        flags += ["--window-size", f"{config.sliding_window - 1},0"]
    if transformer_impl != TRANSFORMER_IMPLS[0]:
        flags += ["--transformer-impl", transformer_impl]
    if ckpt_format == "torch":
        flags += ["--ckpt-format", ckpt_format]
        flags += ["--tensor-model-parallel-size", str(layout.tensor), "--pipeline-model-parallel-size", str(layout.pipeline)]
    return flags


def unknown_there(config: ModelConfig) -> list[str]:
    """What a model is made of that Megatron-LM's ``pretrain_gpt.py`` has not, up to core 0.20: it cannot run it at all."""
    found = {
        "norms after its blocks": config.after_norms,
        "a gated tanh GELU": config.activation == "gelu_tanh",
        "an embedding times √hidden_size": config.scaled_embedding,
        "rotary positions that differ by layer": bool({"rotary_base", "rope_scaling"} & set(config.differing)),
        "layers without rotary positions": None in config.each("rotary_base"),
        "layers of different sizes": not config.is_uniform,
    }
    return [what for what, there in found.items() if there]


def contradictions(config: ModelConfig) -> list[str]:
    """Where Megatron-LM computes something else than a model that it can run, whatever it is told; a sentence each."""
    found, scaling = [], config.rope_scaling
    if scaling and scaling.kind == "llama3":
        constants = {
            name: (getattr(scaling, name), getattr(_LLAMA3, name))
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        }
        found += [
            f"Megatron-LM scales rotary frequencies with {name} {theirs:g}, whatever it is told; this model needs {ours:g}"
            for name, (ours, theirs) in constants.items()
            if ours != theirs
        ]
    if scaling and scaling.kind == "linear" and not float(scaling.factor).is_integer():
        found.append(f"Megatron-LM divides rotary frequencies by whole numbers alone; this model needs {scaling.factor:g}")
    elif scaling and scaling.kind == "linear":
        found.append(
            f"Megatron-LM divides no rotary frequencies before core 0.19, whatever it is told; this model needs {scaling.factor:g}"
        )
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        found.append(
            f"Megatron-LM has no --window-size before core 0.15: attention is to all tokens there, not to {config.sliding_window}"
        )
    return found
