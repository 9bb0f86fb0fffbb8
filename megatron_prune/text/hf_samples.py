"""Text that a Hugging Face model makes itself, by one process, with ``generate`` (see ``runtime/sampling.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from megatron_prune.errors import InputError
from megatron_prune.runtime.sampling import Draws, choose
from megatron_prune.runtime.stock_model import load_stock_model


def sample_hf(
    folder: Path,
    *,
    count: int,
    length: int,
    seed: int,
    bos: int | None,
    temperature: float = 1.0,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Sample texts; an end-of-text token does not end one, and the model's own generation settings are not used.

    The numbers drawn are those of the tensor-parallel route, so both make the same texts, as far as rounding lets them.

    Args:
        folder: Hugging Face directory of the model.
        length: tokens of a sample, with BOS (``None``: the model has none) and the random token that begin it.
        dtype: what to compute in.
        progress: called after every token of a batch with the tokens made so far, out of ``count × length``.

    Returns:
        int64 [count, length] on the CPU.

    Raises:
        InputError: if ``length`` or ``bos`` does not fit the model, or its logits are not finite.
    """
    from transformers import GenerationConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_stock_model(folder, dtype=dtype).to(device)
    if length > model.config.max_position_embeddings:
        raise InputError("length of samples", got=length, needed=f"at most the model's {model.config.max_position_embeddings}")
    model.generation_config = GenerationConfig()  # its own may penalise repetition, or end at a token
    batches = []
    for first in range(0, count, batch_size):
        samples = range(first, min(first + batch_size, count))
        draws = Draws.of(samples, length=length, seed=seed, bos=bos, vocab_size=model.config.vocab_size)
        start = draws.start.to(device)

        def chosen_only(texts: Tensor, logits: Tensor, draws: Draws = draws, made: int = first * length) -> Tensor:
            """A logits processor: all but the token drawn made impossible (``generate``'s own draws depend on the batch)."""
            progress(made + texts.shape[0] * (texts.shape[1] + 1))
            step = texts.shape[1] - draws.start.shape[1]
            chosen = choose(logits, draws.uniforms[:, step].to(device), temperature)
            if (chosen < 0).any():
                raise InputError("the model's logits are not finite", do="check the checkpoint, or compute in fp32 or bf16")
            return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)

        config = GenerationConfig(max_length=length, min_length=length, do_sample=False, use_cache=True)
        texts = model.generate(
            start, attention_mask=torch.ones_like(start), generation_config=config, logits_processor=[chosen_only]
        )
        batches.append(texts.cpu())
    return torch.cat(batches) if batches else torch.empty(0, length, dtype=torch.int64)
