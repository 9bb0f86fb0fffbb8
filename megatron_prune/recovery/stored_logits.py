"""A teacher's most probable tokens, kept: the two models need not be in memory together, nor at the same parallel layout.

DIR/teacher.json                  what was taught on, by whom, how
DIR/part_00000.safetensors        of ``PART`` samples: ids int32, log_probs float16 [samples, tokens, k], rest float32 [samples,
                                  tokens] (probability of what is not listed), digests int64 [samples]

A token costs 6 · k + 4 bytes. A sample's digest is that of its tokens: answers for other tokens are never taken. What the
answers hold is looked at before a run begins (all of it up to ``CHECKED`` bytes, files evenly spread beyond), and again as it
is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Iterable

import numpy
import torch
import torch.distributed as dist
import xxhash
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from megatron_prune.errors import InputError, reason
from megatron_prune.files import staging
from megatron_prune.files.documents import STRICT, read_json
from megatron_prune.recovery.distillation import Answer, Batch, Teacher
from megatron_prune.recovery.loss import TeacherTopK
from megatron_prune.recovery.trainer import TrainingError

DESCRIPTION = "teacher.json"
PART = 64
"""Samples in a file."""
CHECKED = 1 << 30
"""Bytes of answers that are read before a run begins: some seconds."""
_DTYPES = {"ids": "I32", "log_probs": "F16", "rest": "F32", "digests": "I64"}


def part_path(folder: Path, part: int) -> Path:
    """The file of samples ``part · PART`` and after."""
    return folder / f"part_{part:05d}.safetensors"


def digest(tokens: Tensor) -> int:
    """Of a sample's tokens, int64 [tokens]; fits int64."""
    return xxhash.xxh64_intdigest(tokens.contiguous().numpy().tobytes()) >> 1


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable tokens of the whole vocabulary, most probable first, alike on all tensor-parallel ranks.

    Args:
        logits: [batch, tokens, padded vocabulary / TP], this rank's part, padding impossible.

    Returns:
        Ids int32 and log-probabilities at ``temperature`` float16 [batch, tokens, k]; the probability of all others float32
        [batch, tokens]; on the host.
    """
    hot = logits.float() / temperature
    group, ranks = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_world_size()
    values, ids = hot.topk(min(k, hot.shape[-1]), dim=-1)
    ids += hot.shape[-1] * parallel_state.get_tensor_model_parallel_rank()
    log_total = hot.logsumexp(-1)
    if ranks > 1:
        parts = [[torch.empty_like(each) for _ in range(ranks)] for each in (values, ids, log_total)]
        for gathered, own in zip(parts, (values, ids, log_total)):
            dist.all_gather(gathered, own.contiguous(), group=group)
        log_total = torch.stack(parts[2]).logsumexp(0)
        values, order = torch.cat(parts[0], dim=-1).topk(k, dim=-1)
        ids = torch.cat(parts[1], dim=-1).gather(-1, order)
    log_probs = values - log_total.unsqueeze(-1)
    rest = (1.0 - log_probs.double().exp().sum(-1)).clamp(min=0.0).float()
    return ids.int().cpu(), log_probs.half().cpu(), rest.cpu()


def write_part(path: Path, ids: Tensor, log_probs: Tensor, rest: Tensor, tokens: Tensor) -> None:
    """Write one file, atomically.

    Args:
        tokens: int64 [samples, tokens].
    """
    digests = torch.tensor([digest(row) for row in tokens], dtype=torch.int64)
    staging.write_bytes(path, save({"ids": ids, "log_probs": log_probs, "rest": rest, "digests": digests}))


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTeacher(Teacher):
    """Answers from files.

    Args:
        folder: as ``megatron-prune teach`` wrote it.
        vocab_size: of the student.
    """

    folder: Path
    vocab_size: int

    def answers(self, batches: list[Batch]) -> Iterable[Answer]:
        return [partial(self._answer, tokens, numbers) for tokens, _, numbers in batches]

    def _answer(self, tokens: Tensor, numbers: range) -> TeacherTopK:
        rows = [self._row(number, digest(row.cpu())) for number, row in zip(numbers, tokens)]
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        ids, log_probs = (torch.stack(each, dim=1).to(device) for each in zip(*rows))
        return TeacherTopK(ids=ids.long(), log_probs=log_probs)

    def _row(self, number: int, expected: int) -> tuple[Tensor, Tensor]:
        path, row = part_path(self.folder, number // PART), number % PART
        try:
            file = _opened(path)
            ids, log_probs, rest, digests = (file.get_slice(name)[row : row + 1] for name in _DTYPES)
        except (OSError, SafetensorError, RuntimeError, IndexError, ValueError) as error:
            raise TrainingError(f"{path} has no answer for sample {number} any more: {error}") from None
        trouble = "it answers for other tokens" if int(digests) != expected else _trouble(ids, log_probs, rest, self.vocab_size)
        if trouble:
            raise TrainingError(f"{path}, sample {number}: {trouble}; teach again on this data")
        rounded = log_probs[0].float().log_softmax(-1)  # what float16 rounds does not go to the rest
        return ids[0], rounded + (-rest[0]).log1p().unsqueeze(-1)


def _trouble(ids: Tensor, log_probs: Tensor, rest: Tensor, vocab_size: int) -> str | None:
    """What makes answers no distributions over the vocabulary, if anything: [samples, tokens, k] and [samples, tokens]."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        return f"it names token {high if high >= vocab_size else low} of a vocabulary of {vocab_size}"
    if not bool((log_probs <= 1e-3).all()) or bool(log_probs.isinf().any()):
        return "it holds a log-probability that is above 0 or none"
    whole = log_probs.float().exp().sum(-1) + rest
    if not bool(((rest >= 0) & (rest < 1) & ((whole - 1).abs() < 0.05)).all()):
        return "its probabilities do not add up to 1"
    return None


@lru_cache(maxsize=8)
def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def check_parts(folder: Path, samples: int, length: int) -> None:
    """See that every file is there and whole.

    Args:
        length: tokens of a sample.

    Raises:
        InputError: naming the first that is not.
    """
    for part in range(-(-samples // PART)):
        path, rows = part_path(folder, part), min(PART, samples - part * PART)
        if not path.is_file():
            raise InputError(f"{path} is missing or damaged", got="no such file", do="teach again")
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in _DTYPES}
                shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
                dtypes = {name: found.get_dtype() for name, found in slices.items()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is missing or damaged", got=reason(error), do="teach again") from None
        k = shapes["ids"][-1] if shapes["ids"] else 0
        needed = {"ids": (rows, length, k), "log_probs": (rows, length, k), "rest": (rows, length), "digests": (rows,)}
        if shapes != needed or dtypes != _DTYPES or not k:
            raise InputError(
                f"{path} is damaged", got=f"shapes {shapes}, {dtypes}", needed=f"{needed}, {_DTYPES}", do="teach again"
            )


def check_answers(folder: Path, samples: int, vocab_size: int, dataset: Dataset) -> None:
    """See that the answers are for these tokens, and distributions over this vocabulary; see ``CHECKED``.

    Args:
        dataset: what will be trained on; its sample ``n`` has the answer ``n``.

    Raises:
        InputError: naming the file and the sample.
    """
    parts = -(-samples // PART)
    count = min(parts, max(2, CHECKED // part_path(folder, 0).stat().st_size))
    for part in sorted(set(numpy.linspace(0, parts - 1, count).astype(int).tolist())):
        path, first = part_path(folder, part), part * PART
        with safe_open(path, framework="pt") as file:
            ids, log_probs, rest, digests = (file.get_tensor(name) for name in _DTYPES)
        trouble = _trouble(ids, log_probs, rest, vocab_size)
        if trouble:
            raise InputError(f"{path} is damaged", got=trouble, do="teach again")
        for row, found in enumerate(digests.tolist()):
            if digest(dataset[(first + row) % len(dataset)]["tokens"]) != found:
                raise InputError(f"{path} answers for other tokens than sample {first + row} has", do="teach again on this data")


@dataclass(frozen=True, kw_only=True)
class Description:
    """``teacher.json``: who taught, and for which recovery."""

    __pydantic_config__ = STRICT

    teacher: str | None
    vocab_size: int
    top_k: int
    dtype: str
    settings: dict[str, Any]


def read_description(folder: Path) -> Description:
    """``teacher.json``.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise InputError(f"{folder} holds no teacher's answers", do="make them with megatron-prune teach")
    return read_json(path, Description, error=InputError, do="teach again")
