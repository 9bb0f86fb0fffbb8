"""Text that a model makes itself: sampled token after token with cached keys and values, at any TP × PP × DP.

Sample ``i`` of a seed has random numbers of its own, one for every token, so it depends neither on the batch it is made in
nor on the processes that make it (beyond the rounding of the logits). megatron-core is imported where it is used: the
Hugging Face route draws with the same numbers and needs none of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Sequence

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.errors import InputError

if TYPE_CHECKING:
    from megatron_prune.runtime.model import RunningModel


@dataclass(frozen=True, kw_only=True)
class Draws:
    """All the randomness of some samples.

    Attributes:
        start: int64 [samples, 1 or 2]: BOS, where there is one, and a token drawn uniformly from the vocabulary.
        uniforms: float64 [samples, length − tokens of the start] in [0, 1).
    """

    start: Tensor
    uniforms: Tensor

    @classmethod
    def of(cls, samples: Sequence[int], *, length: int, seed: int, bos: int | None, vocab_size: int) -> Draws:
        """The draws of the samples with these numbers.

        Raises:
            InputError: if no token is left to sample, or BOS is not in the vocabulary.
        """
        first = [] if bos is None else [bos]
        if bos is not None and not 0 <= bos < vocab_size:
            raise InputError("BOS token of samples", got=bos, needed=f"an id below {vocab_size}")
        if length < len(first) + 2:
            raise InputError(
                "length of samples", got=length, needed=f"at least {len(first) + 2}: BOS and a random token come first"
            )
        start, uniforms = [], []
        for number in samples:
            generator = numpy.random.default_rng([seed, number])
            start.append([*first, int(generator.integers(vocab_size))])
            uniforms.append(generator.random(length - len(first) - 1))
        empty = not start
        return cls(
            start=torch.tensor(start, dtype=torch.int64).view(len(start), len(first) + 1),
            uniforms=torch.empty(0, length - len(first) - 1) if empty else torch.from_numpy(numpy.stack(uniforms)),
        )


def choose(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw a token a row from ``softmax(logits / temperature)`` by inverting its distribution function.

    Args:
        logits: [batch, vocabulary].
        uniforms: float64 [batch] in [0, 1).

    Returns:
        int64 [batch]; −1 where a row's logits are not finite.
    """
    logits = logits.float()
    weights = logits - logits.amax(dim=1, keepdim=True)
    weights = (weights if temperature == 1.0 else weights.div_(temperature)).exp_()
    batch, vocabulary = weights.shape
    width = math.isqrt(vocabulary)  # a sum over blocks, then one inside a block: a tenth of the time of one over all
    blocks = torch.nn.functional.pad(weights, (0, -vocabulary % width)).view(batch, -1, width)
    sums = blocks.sum(dim=2).double()
    total = sums.sum(dim=1)
    block, rest = _find(sums, uniforms * total)
    place, _ = _find(blocks[torch.arange(batch, device=block.device), block].double(), rest)
    return torch.where(total.isfinite(), block * width + place, -1)


def _find(weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the intervals that follow each other from 0, as long as ``weights`` [batch, intervals], hold ``points`` [batch].

    Rounding leads neither past the last interval nor into an empty one.

    Returns:
        The intervals' numbers, and how far inside the points lie.
    """
    ends = weights.cumsum(dim=1)
    last = torch.nextafter(ends[:, -1], torch.zeros_like(points))
    points = torch.minimum(points.clamp(min=0), last)[:, None]
    found = torch.searchsorted(ends, points, right=True).clamp(max=weights.shape[1] - 1)
    return found[:, 0], (points - ends.gather(1, found) + weights.gather(1, found))[:, 0]


class CachedForward:
    """A batch of texts run through all stages piece by piece, keys and values kept in megatron-core's inference context.

    Calls belong inside ``cpu.stand_in()`` and ``torch.no_grad()``, on every process of a data-parallel copy alike.
    """

    def __init__(self, model: RunningModel, batch: int, length: int):
        from megatron.core.inference.contexts import StaticInferenceContext

        self._model = model
        self._context = StaticInferenceContext(max_batch_size=batch, max_sequence_length=length)

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """Run the next tokens of every text.

        Args:
            tokens: int64 [batch, new tokens].

        Returns:
            Logits after the last of them, [batch, vocabulary], the same on every rank of the last stage; else ``None``.
        """
        from megatron.core.inference import communication_utils as stages
        from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage

        module, context, (batch, new) = self._model.module, self._context, tokens.shape
        if not is_pipeline_first_stage():
            shape = (new, batch, self._model.config.hidden_size)
            hidden = torch.empty(shape, dtype=module.config.pipeline_dtype, device=self._model.device)
            stages.recv_from_prev_pipeline_rank_(hidden)
            module.set_input_tensor(hidden)
        start = context.sequence_len_offset
        positions = torch.arange(start, start + new, device=tokens.device).expand_as(tokens)
        output = module(tokens, positions, attention_mask=None, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(new)
        context.enable_decode_mode()
        if is_pipeline_last_stage():
            return output[:, -1, : self._model.config.vocab_size]
        stages.send_to_next_pipeline_rank(output)
        return None


def sample(
    model: RunningModel,
    *,
    count: int,
    length: int,
    seed: int,
    bos: int | None,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Sample texts; an end-of-text token does not end one.

    Args:
        length: tokens of a sample, with BOS (``None``: the model has none) and the random token that begin it.
        batch_size: samples made at a time by a data-parallel copy; the copies share them all.
        progress: called after every token of a batch with the tokens made so far, out of ``count × length`` (an estimate
            from this process's share, which keeps pace with the others').

    Returns:
        int64 [count, length] on the CPU, the same on every process.

    Raises:
        InputError: if ``length`` or ``bos`` does not fit the model, or its logits are not finite.
    """
    from megatron.core import parallel_state

    from megatron_prune.runtime import cpu

    config = model.config
    if length > config.max_position_embeddings:
        raise InputError("length of samples", got=length, needed=f"at most the model's {config.max_position_embeddings}")
    copies, copy = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = range(-(-count * copy // copies), -(-count * (copy + 1) // copies))
    draws = Draws.of(mine, length=length, seed=seed, bos=bos, vocab_size=config.vocab_size)
    texts = torch.zeros(count, length, dtype=torch.int64, device=model.device)
    with cpu.stand_in(), torch.no_grad():
        for first in range(0, len(mine), batch_size):
            rows = slice(first, first + batch_size)
            batch = Draws(start=draws.start[rows], uniforms=draws.uniforms[rows])
            made = first * length

            def report(tokens: int, made: int = made) -> None:
                progress((made + tokens) * count // len(mine))

            texts[mine.start + first :][: len(batch.start)] = _sample_batch(model, batch, temperature, report)
        dist.all_reduce(texts, group=parallel_state.get_data_parallel_group())
    return texts.cpu()


def _sample_batch(model: RunningModel, draws: Draws, temperature: float, report: Callable[[int], None]) -> Tensor:
    """int64 [batch, length] on the model's device, by one data-parallel copy."""
    start, uniforms = draws.start.to(model.device), draws.uniforms.to(model.device)
    (batch, given), length = start.shape, start.shape[1] + uniforms.shape[1]
    texts = torch.empty(batch, length, dtype=torch.int64, device=model.device)
    texts[:, :given] = start
    forward = CachedForward(model, batch, length)
    for at in range(given, length):
        logits = forward(texts[:, at - given : at] if at == given else texts[:, at - 1 : at])
        texts[:, at] = _agree(model, logits, uniforms[:, at - given], temperature)
        report(batch * (at + 1))
    return texts


def _agree(model: RunningModel, logits: Tensor | None, uniforms: Tensor, temperature: float) -> Tensor:
    """int64 [batch]: the next tokens, drawn by one rank of the last stage and told to its whole data-parallel copy."""
    from megatron.core import parallel_state

    group = parallel_state.get_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    speaker = ranks[-model.layout.tensor]  # tensor-parallel ranks are neighbours, the last stage's come last
    if logits is not None and speaker == dist.get_rank():
        chosen = choose(logits, uniforms, temperature)
    else:
        chosen = torch.empty(len(uniforms), dtype=torch.int64, device=uniforms.device)
    if len(ranks) > 1:
        dist.broadcast(chosen, speaker, group=group)
    if (chosen < 0).any():
        raise InputError("the model's logits are not finite", do="check the checkpoint, or compute in fp32 or bf16")
    return chosen
