"""Tiny models of every family, built by transformers itself and saved to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")

TEXT = "A small text for a small tokenizer. Zwölf Boxkämpfer jagen Viktor. 0123456789 — the end.\n"


def tiny_config(family: str, **changes: Any):
    """A configuration of 4 layers, hidden 48, ffn 96, 12 heads in 12, 6 or 4 … KV groups of 8 channels."""
    from transformers import CONFIG_MAPPING

    sizes = {
        "vocab_size": 307,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 12 if family == "llama" else 6,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if family == "mistral":
        sizes["sliding_window"] = None
    if family == "gemma3_text":
        sizes |= _GEMMA3
        layers = range(changes.get("num_hidden_layers", sizes["num_hidden_layers"]))
        sizes["layer_types"] = [f"{'full' if layer % 3 == 2 else 'sliding'}_attention" for layer in layers]
    return CONFIG_MAPPING[family](**{**sizes, **changes})


_GEMMA3 = {
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "pad_token_id": None,  # its default, 0, is <s> here; transformers gives the padding token's row no gradient
}
"""Gemma 3 (text): every third layer sees everything, the others a window that is shorter than the tests' texts; scores are
scaled by neither head_dim nor hidden / heads."""


def build_tiny(
    path: Path, family: str = "llama", *, dtype: str = "bfloat16", seed: int = 0, shard: str = "5GB", **changes: Any
) -> Path:
    """Save a model with random weights (norms and biases too, so that no two units are alike) and a tokenizer."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    counted_from = 1.0 if family == "gemma3_text" else 0.0  # a norm of weight w multiplies with 1 + w
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(counted_from)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=0.15)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
    _tokenizer(config.vocab_size).save_pretrained(path)
    return path


def _tokenizer(size: int):
    """A byte-level BPE of at most ``size`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, read by safetensors itself."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 logits of stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits
