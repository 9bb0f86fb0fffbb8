"""What a smaller model may cost at most: parameters, a share of them, or memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.config import flag
from megatron_prune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model may cost at most: exactly one of ``params``, ``ratio`` and ``memory``.

    Attributes:
        params: parameters as stored (a tied head counts once, vocabulary padding not at all).
        ratio: share of all parameters to remove, 0 < ratio < 1: ``params = floor(total · (1 − ratio))``.
        memory: bytes of an inference, weights and keys and values:
            ``dtype_bytes · (parameters + 2 · layers · kv_groups · head_dim · seq_length · batch)``.
            The whole sequence is cached even where the model has a sliding window, since not every runtime lets go of what
            is outside of it. Activations and the runtime itself come on top.
        seq_length, batch: tokens of a sequence and sequences in the cache that ``memory`` has to hold.
        dtype_bytes: bytes of a stored weight and of a cached value.
        vocab_size: tokens that will stay, of shapes that still name all; ``None``: as many as the shape says.
    """

    params: int | None = None
    ratio: float | None = None
    memory: int | None = None
    seq_length: int = 4096
    batch: int = 1
    dtype_bytes: int = 2
    vocab_size: int | None = None

    def __post_init__(self):
        named = [name for name in ("params", "ratio", "memory") if getattr(self, name) is not None]
        if len(named) != 1:
            got = " and ".join(flag(name) for name in named) or "none of them"
            raise InputError("a budget", got=got, needed="one of --params, --ratio and --memory")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise InputError("--ratio", got=self.ratio, needed="the share of parameters to remove, between 0 and 1")
        for name in ("params", "memory", "seq_length", "batch", "dtype_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                called = flag(f"memory_{name}" if name in ("seq_length", "batch") else name)
                raise InputError(called, got=value, needed="a positive number")

    def limit(self, config: ModelConfig) -> int:
        """The most that a smaller ``config`` may cost: parameters, or bytes."""
        if self.ratio is not None:
            return floor(parameters(config) * (1 - Fraction(repr(float(self.ratio)))))
        return self.memory if self.params is None else self.params

    def cost(self, config: ModelConfig) -> int:
        """What ``config`` costs, in the unit of :meth:`limit`."""
        config = replace(config, vocab_size=self.vocab_size or config.vocab_size)
        if self.memory is None:
            return parameters(config)
        cached = 2 * cached_features(config) * self.seq_length * self.batch
        return self.dtype_bytes * (parameters(config) + cached)

    def describe(self, cost: int) -> str:
        """A cost with its unit."""
        at = f" at {self.batch} × {self.seq_length} tokens"
        return f"{cost:,} parameters" if self.memory is None else f"{cost:,} bytes of weights, keys and values" + at


def parameters(config: ModelConfig) -> int:
    """:func:`parameter_count`, at a cost that does not grow with the number of layers where these are alike."""
    if not config.is_uniform:
        return parameter_count(config)
    one, two = (parameter_count(config.of_layers([0] * layers)) for layers in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


def cached_features(config: ModelConfig) -> int:
    """Features of a key, and of a value, that a token leaves in the cache of all layers together."""
    if "num_query_groups" not in config.differing:
        return config.num_layers * config.size("kv_head")
    return sum(config.of_layer(layer).size("kv_head") for layer in range(config.num_layers))


def read_budget(
    *, params: str | None, ratio: float | None, memory: str | None, seq_length: int, batch: int, dtype_bytes: int
) -> Budget | None:
    """The budget that options ask for; ``None`` if none does.

    Raises:
        InputError: on more than one, or a value that is none.
    """
    if params is None and ratio is None and memory is None:
        return None
    return Budget(
        params=None if params is None else parse_count(params),
        ratio=ratio,
        memory=None if memory is None else parse_bytes(memory),
        seq_length=seq_length,
        batch=batch,
        dtype_bytes=dtype_bytes,
    )


def parse_count(text: str, flag: str = "--params") -> int:
    """``"90M"``, ``"1.5B"``, ``"12e9"``, ``"123456"`` → that many; a broken number is rounded down.

    Raises:
        InputError: if it is not such a count, or zero.
    """
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?(?:E\+?[0-9]{1,2})?)\s*([KMBT]?)", text.strip().upper())
    count = floor(Fraction(match[1]) * 1000 ** " KMBT".index(match[2] or " ")) if match else 0
    if count < 1:
        raise InputError(flag, got=repr(text[:40]), needed="a count such as 90M, 1.5B or 123456")
    return count


def parse_bytes(text: str, flag: str = "--memory") -> int:
    """``"500MB"``, ``"5G"`` (decimal, as transformers reads them), ``"2GiB"`` (binary) → bytes, rounded down.

    Raises:
        InputError: if it is not such a size, or zero.
    """
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([KMGT])(I?))?B?", text.strip().upper())
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ") if match else 0
    count = floor(Fraction(match[1]) * unit) if match else 0
    if count < 1:
        raise InputError(flag, got=repr(text[:40]), needed="a size such as 5GB, 500MB (decimal) or 2GiB (binary)")
    return count
