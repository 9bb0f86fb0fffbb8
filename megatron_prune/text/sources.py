"""``--data``: what the user writes, and the calibration it becomes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

from megatron_prune.errors import InputError
from megatron_prune.text.contents import check_read_once
from megatron_prune.text.data_specs import DataSpec
from megatron_prune.text.encoder import Encoder
from megatron_prune.text.reader import Drawn, Reader, led, open_reader
from megatron_prune.text.readers.samples import Self
from megatron_prune.text.splits import TRAIN
from megatron_prune.text.tokens import Calibration, check_samples, tensor_digest

MOST_TOKENS = 1 << 32
"""Of all samples of a source."""


def load_calibration(
    specs: Sequence[DataSpec],
    *,
    tokenizer_dir: Path | None,
    seq_length: int,
    nsamples: int,
    seed: int,
    max_position_embeddings: int,
    vocab_size: int,
    split: str = TRAIN,
    field: str = "text",
    leading: int | None = None,
    self_samples: Callable[[int], torch.Tensor] | None = None,
) -> Calibration:
    """Read every source and mix them: a pure function of its arguments and the files, so alike on every rank.

    What can be refused without reading is refused first (:func:`check_calibration`), then data is read, and own samples are
    drawn last.

    Args:
        specs: as :func:`parse_data` returns them.
        tokenizer_dir: Hugging Face directory of the tokenizer; ``None`` will do where no text is read.
        nsamples: samples of each source; how much a source counts is its weight's business.
        split: of data sets: ``train`` is the one for calibration, whatever its name there.
        field: name of the text in records.
        leading: the token that every sample begins with, if the model needs one.
        self_samples: count → int64 [count, seq_length], drawn from the unpruned model with the caller's seed.

    Returns:
        ``nsamples`` samples of each source, source after source.

    Raises:
        InputError: if the sizes do not fit the model, a source is missing, empty or too short, own samples are asked for
            and cannot be made, or a token is not in the vocabulary.
    """
    sizes = {"seq_length": seq_length, "nsamples": nsamples, "seed": seed}
    encode, told = Encoder(tokenizer_dir), {"field": field, "split": split}
    readers = check_calibration(specs, encode, **sizes, max_position_embeddings=max_position_embeddings, **told)
    for reader in readers:
        _prepare(reader, self_samples)
    drawn: dict[int, Drawn] = {}
    for number in sorted(range(len(readers)), key=lambda number: isinstance(readers[number], Self)):
        drawn[number] = led(readers[number].draw(seq_length=seq_length, count=nsamples, seed=seed), leading)
        _check_tokens(specs[number].name, drawn[number], vocab_size)
    weights = [spec.weight for spec in specs]
    settings = [{"name": reader.label, "seq_length": seq_length, "seed": seed} for reader in readers]
    return _mix(weights, [drawn[number] for number in range(len(specs))], settings)


def check_calibration(
    specs: Sequence[DataSpec],
    encode: Encoder,
    *,
    seq_length: int,
    nsamples: int,
    seed: int,
    max_position_embeddings: int,
    split: str = TRAIN,
    field: str = "text",
) -> list[Reader]:
    """The readers of :func:`load_calibration`, of which nothing is read yet.

    Raises:
        InputError: if the sizes do not fit the model, or a source is not there.
    """
    _check_sizes(seq_length, nsamples, seed, max_position_embeddings)
    if not specs:
        raise InputError("calibration without a source", needed="at least one, such as self")
    readers = [open_reader(spec.name, encode=encode, field=field, split=split) for spec in specs]
    check_read_once("--data", ((reader.name, reader.files()) for reader in readers))
    return readers


def _check_sizes(seq_length: int, nsamples: int, seed: int, max_position_embeddings: int) -> None:
    if seq_length < 2:
        raise InputError("--seq-length", got=seq_length, needed="at least 2: the first token is never predicted")
    if seq_length > max_position_embeddings:
        raise InputError("--seq-length", got=seq_length, needed=f"at most the model's {max_position_embeddings}")
    check_amount(nsamples, seq_length)
    check_seed(seed)


def check_amount(nsamples: int, seq_length: int) -> None:
    """Refuse numbers of samples that are none, or that no memory holds.

    Raises:
        InputError: naming the flag.
    """
    most = max(1, MOST_TOKENS // max(seq_length, 1))
    if not 1 <= nsamples <= most:
        raise InputError("--nsamples", got=nsamples, needed=f"a positive number, at most {most}")


def check_seed(seed: int) -> None:
    """Refuse a seed that not all generators take.

    Raises:
        InputError: if it is negative or too large.
    """
    if not 0 <= seed < 1 << 63:
        raise InputError("--seed", got=seed, needed="a whole number from 0 on, below 2^63")


def _prepare(reader: Reader, self_samples: Callable[[int], torch.Tensor] | None) -> None:
    """Load the tokenizer, or hand over the sampler, before any source is read."""
    if isinstance(reader, Self):
        if self_samples is None:
            raise InputError("--data=self needs a model to draw samples from", do="name data, or a kept .safetensors of samples")
        reader.sampler = self_samples
    if reader.needs_tokenizer:
        reader.encode.load()


def _check_tokens(name: str, drawn: Drawn, vocab_size: int) -> None:
    check_samples(name, drawn.tokens, drawn.lengths)
    lowest, highest = int(drawn.tokens.min()), int(drawn.tokens.max())
    if lowest < 0 or highest >= vocab_size:
        raise InputError(
            f"{name}: a token is not in the model's vocabulary",
            got=f"token {lowest if lowest < 0 else highest}",
            needed=f"0 to {vocab_size - 1}",
            do="use the tokenizer (or data made with the tokenizer) of this model",
        )


def _mix(weights: list[float], drawn: list[Drawn], settings: list[dict[str, Any]]) -> Calibration:
    """Every token of a source weighs share × (all tokens) / (the source's tokens)."""
    counts = [int(each.lengths.sum()) for each in drawn]
    shares = [weight / math.fsum(weights) for weight in weights]
    each_token = [share * sum(counts) / count for share, count in zip(shares, counts)]
    return Calibration(
        tokens=torch.cat([each.tokens for each in drawn]),
        lengths=torch.cat([each.lengths for each in drawn]),
        weights=torch.tensor(each_token, dtype=torch.float64).repeat_interleave(torch.tensor([len(d.tokens) for d in drawn])),
        provenance=[
            {**given, **each.facts, "digest": tensor_digest(each.tokens, each.lengths)}
            | {"samples": len(each.tokens), "tokens": count, "share": share}
            for given, each, count, share in zip(settings, drawn, counts, shares)
        ],
    )
