"""What calibration runs on: samples of tokens and what each token counts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_prune.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Samples of one or several sources, the same on every rank.

    Attributes:
        tokens: int64 [samples, seq_length], right-padded with 0 where a sample is shorter.
        lengths: int64 [samples], the real tokens of each sample: 2 to seq_length.
        weights: float64 [samples], what every token of a sample counts in second moments. Over a whole calibration
            ``(weights * lengths).sum() == lengths.sum()``, and each source's part of that sum is its share.
        provenance: one JSON-able entry per source: name, split, digest, samples, tokens, share, seq_length, seed.

    Raises:
        InputError: if the three tensors do not fit each other, a sample has fewer than 2 tokens, or a weight is not a
            positive number.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor
    provenance: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_samples("calibration", self.tokens, self.lengths)
        if self.weights.dtype != torch.float64 or self.weights.shape != self.lengths.shape:
            raise InputError(
                "weights of calibration samples",
                got=f"{self.weights.dtype} {list(self.weights.shape)}",
                needed=f"float64 {list(self.lengths.shape)}",
            )
        if not bool((self.weights.isfinite() & (self.weights > 0)).all()):
            raise InputError("weights of calibration samples", got=self.weights.tolist()[:8], needed="positive numbers")

    @property
    def digest(self) -> str:
        """SHA-256 over tokens, lengths and weights, with their shapes."""
        return tensor_digest(self.tokens, self.lengths, self.weights)

    def share(self, copy: int, copies: int) -> Calibration:
        """The samples ``copy``, ``copy + copies``, … that one of ``copies`` data-parallel copies runs (perhaps none).

        Weights stay as they are, so sums over all copies are the sums over the whole.
        """
        if not 0 <= copy < copies:
            raise ValueError(f"copy {copy} of {copies}")
        part = slice(copy, None, copies)
        return replace(self, tokens=self.tokens[part], lengths=self.lengths[part], weights=self.weights[part])


def check_samples(what: str, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
    """Refuse tensors that are no samples.

    Raises:
        InputError: unless ``tokens`` is int64 [samples, seq_length] and ``lengths`` int64 [samples] within 2 … seq_length.
    """
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise InputError(f"tokens of {what}", got=f"{tokens.dtype} {list(tokens.shape)}", needed="int64 [samples, seq_length]")
    if lengths.dtype != torch.int64 or lengths.shape != tokens.shape[:1]:
        raise InputError(f"lengths of {what}", got=f"{lengths.dtype} {list(lengths.shape)}", needed=f"int64 [{tokens.shape[0]}]")
    if lengths.numel() and (int(lengths.min()) < 2 or int(lengths.max()) > tokens.shape[1]):
        raise InputError(
            f"a sample of {what}",
            got=f"{int(lengths.min())} to {int(lengths.max())} tokens",
            needed=f"2 to {tokens.shape[1]}: the first token is never predicted",
        )


def tensor_digest(*tensors: torch.Tensor) -> str:
    """SHA-256 over dtypes, shapes and bytes (little-endian)."""
    total = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        total.update(f"{array.dtype.name} {list(array.shape)};".encode())
        total.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return total.hexdigest()
