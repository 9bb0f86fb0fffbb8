"""A teacher's most probable tokens, kept: the two models need not be in memory together, nor at the same parallel layout.

DIR/teacher.json                  what was taught on, by whom, how
DIR/part_00000.safetensors        of ``PART`` samples: ids int32, log_probs float16 [samples, tokens, k], rest float32 [samples,
                                  tokens] (probability of what is not listed), digests int64 [samples]

A token costs 6 · k + 4 bytes. A sample's digest is that of its tokens: answers for other tokens are never taken.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Iterable

import torch
import torch.distributed as dist
import xxhash
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.files import staging
from megatron_prune.recovery.distillation import Answer, Batch, Teacher
from megatron_prune.recovery.loss import TeacherTopK

DESCRIPTION = "teacher.json"
PART = 64
"""Samples in a file."""


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
    """

    folder: Path

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
            if int(file.get_slice("digests")[row : row + 1]) != expected:
                raise InputError(f"{path} answers for other tokens than sample {number} has", do="teach again on this data")
            rest = file.get_slice("rest")[row]
            rounded = file.get_slice("log_probs")[row].float().log_softmax(-1)  # what float16 rounds does not go to the rest
            return file.get_slice("ids")[row], rounded + (-rest).log1p().unsqueeze(-1)
        except (OSError, SafetensorError, RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError(f"{path} has no answer for sample {number}", got=str(error), do="teach again") from None


@lru_cache(maxsize=8)
def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def check_parts(folder: Path, samples: int, length: int) -> None:
    """See that every file is there and whole; what it answers for is looked at when it is asked.

    Args:
        length: tokens of a sample.

    Raises:
        InputError: naming the first that is not.
    """
    for part in range(-(-samples // PART)):
        path, rows = part_path(folder, part), min(PART, samples - part * PART)
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in ("ids", "log_probs", "rest", "digests")}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is missing or damaged", got=str(error), do="teach again") from None
        k = shapes["ids"][-1] if shapes["ids"] else 0
        needed = {"ids": (rows, length, k), "log_probs": (rows, length, k), "rest": (rows, length), "digests": (rows,)}
        if shapes != needed:
            raise InputError(f"{path} is damaged", got=f"shapes {shapes}", needed=f"{needed}", do="teach again")


def read_description(folder: Path) -> dict[str, Any]:
    """``teacher.json``.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if not (isinstance(described["vocab_size"], int) and isinstance(described["settings"], dict)):
            raise ValueError("no vocabulary or settings")
        return described
    except FileNotFoundError:
        raise InputError(f"{folder} holds no teacher's answers", do="make them with megatron-prune teach") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / DESCRIPTION} is damaged", got=repr(error), do="teach again") from None
