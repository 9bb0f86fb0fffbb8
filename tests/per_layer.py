"""Models whose layers have sizes of their own: drawn, or as random weights on disk."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from hypothesis import strategies as st
from tiny import tiny_config

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import full_shape, tensor_ids
from megatron_prune.checkpoint import both_versions, huggingface
from megatron_prune.families.choice import choose_family
from megatron_prune.families.family import FAMILIES, Family
from megatron_prune.files.region import Scratch

HEADS_ALIKE = ("gemma3_text", "llama")
"""Families whose class in transformers asks that heads divide the stream, of the model as a whole."""


def like_tiny(family: str, **changes) -> ModelConfig:
    """What ``tests/tiny.py`` builds, as a model."""
    return FAMILIES.get(family).model_config(tiny_config(family, **changes).to_dict())


def mixed(family: str, *, heads: bool | None = None) -> ModelConfig:
    """The tiny model with every kind of difference: no attention, and no feed-forward block, where a cache begins and ends too.

    Args:
        heads: query heads differ (default: where the family's class can say that).
    """
    config, heads = like_tiny(family), family not in HEADS_ALIKE if heads is None else heads
    more = config.num_layers - 4
    return dataclasses.replace(
        config,
        ffn_hidden_size=(96, 40, 0, 64, *[96] * more),
        num_attention_heads=(0, 6 if heads else 12, 12, 12, *[12] * more),
        num_query_groups=(0, 2, 4, 6, *[6] * more),
    )


def written_as(family: str, asked: str) -> Family:
    """What ``--target-family`` makes of a family's models."""
    return choose_family(FAMILIES.get(family), asked, like_tiny(family))


@st.composite
def sizes_by_layer(draw, layers: int, heads: int | None = None) -> dict[str, tuple[int, ...]]:
    """Sizes of every layer, any of which may lack blocks, with ``heads`` query heads, if that is said.

    One block of a layer is always there.
    """
    found = []
    for _ in range(layers):
        groups = draw(st.sampled_from([group for group in range(1, 13) if not heads or heads % group == 0]))
        attention = (heads or groups * draw(st.integers(1, 3)), groups)
        attention = draw(st.sampled_from([attention, attention, (0, 0)]))
        width = draw(st.sampled_from([1, 40, 40, 96, 0])) if any(attention) else draw(st.integers(1, 40))
        found.append((width, *attention))
    return dict(zip(("ffn_hidden_size", "num_attention_heads", "num_query_groups"), zip(*found)))


def weights_of(config: ModelConfig, seed: int = 0) -> dict:
    """Random role tensors, no two units alike, float32."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for tensor in tensor_ids(config):
        shape = full_shape(tensor, config)
        norm = len(shape) == 1 and not tensor.role.endswith("bias")
        scale = torch.rand if norm else torch.randn
        data = scale(shape, generator=generator)
        found[tensor] = data + 0.5 - config.norm_offset if norm else data * 0.15
    return found


def write_model(
    folder: Path,
    config: ModelConfig,
    family: Family,
    *,
    beside: Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A directory with random weights.

    Args:
        beside: a model whose tokenizer goes along.
    """
    folder.mkdir(parents=True)
    for file in beside.glob("tokenizer*") if beside else ():
        shutil.copyfile(file, folder / file.name)
    both_versions.rewrite_side_files(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}  # transformers gives a padding token no gradient
    described = {**family.hf_config(config, None), **ends, "dtype": str(dtype).removeprefix("torch.")}
    dtypes = dict.fromkeys(tensor_ids(config), dtype)
    huggingface.lay_out(folder, config, family, described, dtypes, max_shard_bytes=10**9)
    tensors = huggingface.open_model(folder).tensors
    for tensor, data in weights_of(config, seed).items():
        tensors.write(tensor, data.to(dtype), Scratch())
    return folder
