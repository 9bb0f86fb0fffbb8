"""Folding dropped tokens into the head: a row that stays takes over what the rows of dropped tokens said.

After a vocabulary is cut, a text that used a dropped token goes on with the first piece of it. So the head must give a piece the
probability of the piece and of all dropped tokens that begin with it: for a hidden state h the logit should be

    t(h) = log( exp(w · h) + Σ_d exp(w_d · h) ),   d: dropped tokens whose first piece it is,

which no row can say exactly. The row that says it best, in least squares over hidden states of the model on calibration text, each
weighted with the probability that is at stake there, held to the row as it was by a ridge in the metric of the hidden states'
second moment M:

    w' = argmin Σ_h p(h) (w' · h - t(h))² + λ (w' - w)ᵀ M (w' - w),   p(h) = exp(t(h)) / Σ_all exp.

(Ours. The mean of the rows, weighted with counts, makes the model worse: ``docs/vocabulary.md``.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable

import numpy
import torch
from torch import Tensor

from megatron_prune.arch.tensors import TensorId, head_of
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.walk import Walk
from megatron_prune.runtime.ends import final_norm_factors, norm
from megatron_prune.runtime.stage import Stage
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration
from megatron_prune.vocabulary.id_map import IdMap

TOKENS = 32_768
"""Hidden states that are looked at, at most."""

NEAREST = 384
"""Hidden states that a row is fitted to: those where most is at stake."""

RIDGE = 3.0
"""λ, in units of probability: a row goes half of the way where this much is at stake over all hidden states."""

_ROWS = 32
"""Rows that are fitted together."""

_DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldedRows:
    """Attributes:
    tokens: int64 [rows], old ids of the rows that change, ascending.
    rows: float32 [rows, hidden].
    """

    tokens: Tensor
    rows: Tensor

    def put_into(self, head: Tensor) -> Tensor:
        """A full head, [old rows, hidden], with these rows in place of its own; changed in place."""
        head[self.tokens] = self.rows.to(head.dtype)
        return head


def respelled(calibration: Calibration, ids: IdMap) -> Calibration:
    """The samples as the trimmed tokenizer spells them, in old ids, cut to their length before."""
    tokens, lengths = torch.zeros_like(calibration.tokens), calibration.lengths.clone()
    for number, (sample, length) in enumerate(zip(calibration.tokens, calibration.lengths.tolist())):
        found = torch.from_numpy(ids.new_to_old[ids.apply(sample[:length].numpy())[0]])[:length]
        tokens[number, : len(found)] = found
        lengths[number] = len(found)
    kept = lengths >= 2
    return replace(calibration, tokens=tokens[kept], lengths=lengths[kept], weights=calibration.weights[kept])


def first_pieces(ids: IdMap) -> numpy.ndarray:
    """int64 [old rows]: the old id of the first piece of every dropped token; -1 for tokens that stay and rows without one."""
    found = numpy.full(len(ids.starts) - 1, -1, dtype=numpy.int64)
    dropped = numpy.flatnonzero((ids.old_to_new < 0) & (numpy.diff(ids.starts) > 0))
    found[dropped] = ids.new_to_old[ids.pieces[ids.starts[dropped]]]
    return found


def changing_rows(ids: IdMap) -> int:
    """How many rows of the head change."""
    return len(numpy.unique(first_pieces(ids))) - 1


def hidden_states(
    tensors: TensorMap, calibration: Calibration, stage: Stage, world: World, dtype: torch.dtype, progress: Callable[[int], None]
) -> Tensor:
    """Outputs of the final norm at up to :data:`TOKENS` tokens, float32 [tokens, hidden] on the host, the same everywhere.

    Args:
        progress: called with the number of tokens that went through a layer.
    """
    config, walk = tensors.config, Walk(tensors, calibration, stage, world, dtype=dtype, progress=progress)
    walk.to_the_end()
    inside = torch.arange(calibration.tokens.shape[1])[None] < calibration.lengths[:, None]
    places = inside.nonzero()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    places = places[order[:TOKENS].sort().values]
    found = torch.zeros(len(places), config.hidden_size, device=stage.device)
    row, sample = (places[:, :1] == walk.numbers).nonzero(as_tuple=True)
    found[row.to(stage.device)] = walk.stream[sample, places[row, 1]].float().to(stage.device)
    found = stage.sum_copies(found).cpu()
    return norm(found, config) * final_norm_factors(tensors).float()


def fold_rows(
    tensors: TensorMap,
    ids: IdMap,
    hidden: Tensor,
    stage: Stage,
    world: World,
    progress: Callable[[int], None] = lambda rows: None,
) -> FoldedRows:
    """The rows of the head that change; every process takes part and gets them all.

    Args:
        hidden: float32 [tokens, hidden], of :func:`hidden_states` on text that is spelled as it will be.
        progress: called with the number of rows fitted since, by all processes.
    """
    config, device = tensors.config, stage.device
    head = head_of(config)
    first = first_pieces(ids)
    changing = numpy.unique(first[first >= 0])
    members = {int(token): [int(token)] for token in changing}
    for token in numpy.flatnonzero(first >= 0).tolist():
        members[int(first[token])].append(token)
    hidden = hidden.to(device)
    normalizer = _normalizer(tensors, head, hidden)
    moment = (hidden.double().T @ hidden.double()) / len(hidden)
    damping = _DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64, device=device)
    factor = torch.linalg.cholesky(moment + damping).float()
    white = torch.linalg.solve_triangular(factor, hidden.T, upper=False).T
    found = torch.zeros(len(changing), config.hidden_size)
    mine = range(world.rank, len(changing), world.size)
    for start in range(0, len(mine), _ROWS):
        places = list(mine[start : start + _ROWS])
        groups = [members[int(changing[place])] for place in places]
        found[places] = _fitted(tensors, head, groups, hidden, white, factor, normalizer)
        progress(len(places) * world.size)
    rows = sum(torch.from_numpy(part) for part in world.all_gather(found.numpy())) if world.size > 1 else found
    return FoldedRows(tokens=torch.from_numpy(changing), rows=rows)


def _normalizer(tensors: TensorMap, head: TensorId, hidden: Tensor) -> Tensor:
    """log Σ exp of all logits, [tokens]."""
    config, total, step = tensors.config, None, 1 << 13
    for start in range(0, config.vocab_size, step):
        rows = range(start, min(start + step, config.vocab_size))
        block = tensors.read_block(head, rows, range(config.hidden_size)).float().to(hidden.device)
        part = torch.cat([(piece @ block.T).logsumexp(dim=1) for piece in hidden.split(2048)])
        total = part if total is None else torch.logaddexp(total, part)
    return total


def _fitted(
    tensors: TensorMap,
    head: TensorId,
    groups: list[list[int]],
    hidden: Tensor,
    white: Tensor,
    factor: Tensor,
    normalizer: Tensor,
) -> Tensor:
    """The fitted rows, [groups, hidden] on the host; a group is the token that stays and those that begin with it."""
    width = range(tensors.config.hidden_size)
    read = lambda token: tensors.read_block(head, range(token, token + 1), width)
    matrix = torch.cat([read(token) for group in groups for token in group]).float().to(hidden.device)
    own = numpy.cumsum([0, *map(len, groups)])
    logits = hidden @ matrix.T
    wanted = torch.stack([logits[:, a:b].logsumexp(dim=1) for a, b in zip(own, own[1:])])  # [groups, tokens]
    kept = matrix[own[:-1]]
    lacking = wanted - logits[:, own[:-1]].T
    stake = (wanted - normalizer).exp()
    most = stake.topk(min(NEAREST, len(hidden)), dim=1)
    root = most.values.sqrt()
    inputs = white[most.indices] * root[..., None]  # [groups, nearest, hidden]
    gram = inputs @ inputs.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    wish = (lacking.gather(1, most.indices) * root)[..., None]
    solved = torch.cholesky_solve(wish, torch.linalg.cholesky(gram))
    change = (inputs.transpose(1, 2) @ solved)[..., 0]
    return (kept + torch.linalg.solve_triangular(factor.T, change.T, upper=True).T).cpu()
