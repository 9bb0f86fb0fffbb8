"""The model's own samples: kept in a file (``self.safetensors``), or drawn now (``self``)."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import torch

from megatron_prune.errors import InputError
from megatron_prune.text.artifact import load_samples
from megatron_prune.text.reader import READERS, Drawn, Reader, full


@READERS.register(".safetensors")
class KeptSamples(Reader):
    """The first samples of a file, each cut to the sequence length; what the file says of itself goes to the provenance."""

    needs_tokenizer = False

    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        tokens, provenance = load_samples(Path(self.name))
        if len(tokens) < count or tokens.shape[1] < seq_length:
            raise InputError(
                f"{self.name} holds fewer tokens than asked for",
                got=f"{tokens.shape[0]} samples of {tokens.shape[1]}",
                needed=f"{count} samples of {seq_length}",
                do="sample more, or lower --nsamples or --seq-length",
            )
        return full(tokens[:count, :seq_length].contiguous(), {"split": None, "samples_of": provenance})

    def windows(self, *, seq_length: int, count: int) -> Drawn:
        raise InputError(
            f"{self.name}: a model is not measured on samples of its own", needed="text", do="name a text or data set"
        )


@READERS.register("self")
class Self(Reader):
    """Samples drawn from the unpruned model by ``sampler``, which whoever holds the model sets."""

    needs_tokenizer = False
    sampler: Callable[[int], torch.Tensor] | None = None

    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        if self.sampler is None:
            raise InputError(
                "'self' needs a model to draw samples from, and there is none here", do="name data, or a kept .safetensors"
            )
        tokens = self.sampler(count)
        if tokens.dtype != torch.int64 or tokens.shape != (count, seq_length):
            raise InputError(
                "the model's own samples",
                got=f"{tokens.dtype} {list(tokens.shape)}",
                needed=f"int64 [{count}, {seq_length}]",
            )
        return full(tokens.cpu(), {"split": None})

    def windows(self, *, seq_length: int, count: int) -> Drawn:
        raise InputError("'self': a model is not measured on samples of its own", needed="text", do="name a text or data set")
