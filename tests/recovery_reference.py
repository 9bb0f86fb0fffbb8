"""Recovery written out once more for one process: the losses by plain torch, the training by transformers and torch's AdamW.

Nothing here knows this project, but for the class of a model whose layers differ, which is not transformers' own. The samples come from megatron-core's own data set, which is what the order of the data is
defined by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

# ------------------------------------------------------------------------------------------------------------------ losses


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of logits [..., vocabulary], both at a temperature."""
    own, taught = (functional.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return functional.kl_div(own, taught, reduction="none", log_target=True).sum(-1)


def coarse_kl_divergence(student: Tensor, ids: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """KL over the tokens ``ids`` [..., k], of log-probabilities ``taught`` [..., k], and one bucket with all others."""
    own = (student / temperature).log_softmax(-1).gather(-1, ids)
    listed = (taught.exp() * (taught - own)).sum(-1)
    others = torch.ones_like(student).scatter(-1, ids, 0.0)
    own_rest = ((student / temperature).softmax(-1) * others).sum(-1)
    rest = 1.0 - taught.exp().sum(-1)
    whole = ids.shape[-1] == student.shape[-1]
    return listed if whole else listed + rest * (rest.log() - own_rest.log())


def coarse_answer(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [..., k] of a distribution's most probable tokens as a file keeps them: their shares of what
    is listed rounded to float16, what is listed altogether not.
    """
    probable, ids = (logits.double() / temperature).log_softmax(-1).topk(k, dim=-1)
    whole = probable.exp().sum(-1, keepdim=True).clamp(max=1.0)
    shares = probable.half().double().exp()
    return ids, (whole * shares / shares.sum(-1, keepdim=True)).log().float()


def unlikeness(one: Tensor, other: Tensor) -> Tensor:
    """1 - linear CKA, mean over the batch, of [batch, tokens, width]: by the features' cross-covariances, as Kornblith et al.
    2019 (arXiv 1905.00414) write it in section 3, in float64.
    """
    values = []
    for left, right in zip(one.double(), other.double()):
        left, right = ((each / each.square().mean(-1, keepdim=True).sqrt()) for each in (left, right))
        left, right = left - left.mean(0), right - right.mean(0)
        norm = lambda a, b: torch.linalg.matrix_norm(a.T @ b)
        values.append(1 - norm(right, left) ** 2 / (norm(left, left) * norm(right, right)))
    return torch.stack(values).mean()


# -------------------------------------------------------------------------------------------------------------------- data


def documents(count: int, *, seed: int = 0, vocab: int = 307, shortest: int = 5, longest: int = 60) -> list[list[int]]:
    """Random documents of random lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(0, vocab, (length,), generator=draw).tolist() for length in lengths]


def write_pair(prefix: Path, texts: list[list[int]], dtype: Any = numpy.uint16) -> str:
    """A ``.bin/.idx`` pair by megatron-core's builder; its prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        builder.add_document(torch.tensor(text), [len(text)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


class _Tokenizer:
    unique_identifiers: dict[str, Any] = {}
    eod, vocab_size = -1, None


def samples(
    blend: list[Any], split: str | None, *, seq_length: int, seed: int, counts: tuple[int, int, int]
) -> list[Tensor | None]:
    """The training, validation and test samples, int64 [count, seq_length + 1], that megatron-core's GPTDataset draws.

    Args:
        blend: ``(prefixes, weights or None)`` cut by ``split``; or one such blend for each split.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend=blend if split else None,
        blend_per_split=None if split else blend,
        split=split,
    )
    made = BlendedMegatronDatasetBuilder(GPTDataset, list(counts), lambda: True, config).build()
    return [None if each is None else _whole(each, count) for each, count in zip(made, counts)]


def _whole(dataset: Any, count: int) -> Tensor:
    items = [dataset[number] for number in range(count)]
    return torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])


# ---------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate after a number of updates, as the arguments of the run describe it."""

    lr: float
    min_lr: float
    style: str = "cosine"
    warmup: int = 0
    decay: int

    def at(self, updates: int) -> float:
        """For the update after ``updates`` of them."""
        if self.warmup and updates <= self.warmup:
            return self.lr * updates / self.warmup
        if self.style == "constant":
            return self.lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.lr * math.sqrt(self.warmup / updates))
        share = min(1.0, (updates - self.warmup) / (self.decay - self.warmup))
        fall = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share}[self.style]
        return self.min_lr + (self.lr - self.min_lr) * fall


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a training did: before each update, and at the end."""

    losses: list[float]
    cross_entropies: list[float]
    divergences: list[float]
    unlike: list[float]
    norms: list[float]
    rates: list[float]
    model: torch.nn.Module


def load(folder: Path) -> torch.nn.Module:
    """A model in float32, as transformers runs it, or the file that leaves with it."""
    from megatron_prune.runtime.stock_model import load_stock_model

    return load_stock_model(folder, dtype=torch.float32)


def cross_entropy(model: torch.nn.Module, tokens: Tensor, counted: Tensor | None = None) -> float:
    """Mean next-token loss on samples [count, seq_length + 1], in nats; of tokens that count, where some do not."""
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.double()
    return float(functional.cross_entropy(logits.flatten(0, 1), labels(tokens, counted).flatten()))


def labels(tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """The next tokens; -100, which torch ignores, for those that do not count (0 in ``counted``)."""
    return tokens[:, 1:] if counted is None else tokens[:, 1:].masked_fill(counted[:, 1:] == 0, -100)


def train(
    folder: Path,
    batches: list[Tensor],
    schedule: Schedule,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
    teacher: Path | None = None,
    weight: float = 0.0,
    temperature: float = 1.0,
    listed: int | None = None,
    layers: tuple[tuple[int, int], ...] = (),
    hidden_weight: float = 0.0,
    model: torch.nn.Module | None = None,
    counted: list[Tensor] | None = None,
) -> Course:
    """Train on batches [samples, seq_length + 1]; no weight decay on biases and norms.

    Args:
        listed: tokens of the teacher's distributions that are known.
        layers: whose outputs are compared with the teacher's, (own, teacher's).
        model: to train what is trainable of, instead of the one in ``folder``.
        counted: for every batch, 1 where a token counts, else 0; all count where there is none.
    """
    model, taught = model or load(folder), load(teacher) if teacher else None
    seen = [(_watch(model, own), _watch(taught, theirs)) for own, theirs in layers]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
    rows = []
    for number, tokens in enumerate(batches):
        logits = model(tokens[:, :-1]).logits
        wanted = labels(tokens, counted and counted[number])
        plain = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        divergence = unlike = torch.zeros(())
        if taught is not None:
            with torch.no_grad():
                answer = taught(tokens[:, :-1]).logits
            if listed is None:
                divergence = kl_divergence(logits, answer, temperature)[wanted >= 0].mean()
            else:
                divergence = coarse_kl_divergence(logits, *coarse_answer(answer, listed, temperature), temperature).mean()
        if layers:
            unlike = torch.stack([unlikeness(own[-1], theirs[-1].detach()) for own, theirs in seen]).mean()
        loss = (1 - weight) * plain + weight * temperature**2 * divergence + hidden_weight * unlike
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip if clip else math.inf)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(number)
        optimizer.step()
        rows.append((loss.item(), plain.item(), divergence.item(), unlike.item(), float(norm), schedule.at(number)))
    names = ("losses", "cross_entropies", "divergences", "unlike", "norms", "rates")
    return Course(**{name: list(column) for name, column in zip(names, zip(*rows))}, model=model.eval())


def _watch(model: torch.nn.Module, layer: int) -> list[Tensor]:
    """What the layer put out, the last at the end."""
    seen: list[Tensor] = []
    model.model.layers[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen
