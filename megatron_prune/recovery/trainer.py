"""One training step and one measurement, through megatron-core's pipeline schedule at any TP × PP × DP."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.utils.data import Dataset

from megatron_prune.errors import PruneError
from megatron_prune.recovery.data import IGNORED, BatchSizes, step_batches
from megatron_prune.recovery.distillation import Teacher
from megatron_prune.recovery.hidden_match import HiddenMatch
from megatron_prune.recovery.lora import Adapter
from megatron_prune.recovery.loss import Distillation, vocab_parallel_losses
from megatron_prune.recovery.optimizer import OptimizerOptions, build_optimizer
from megatron_prune.runtime import cpu
from megatron_prune.runtime.model import RunningModel

Measured = tuple[float, float, float, float]
"""What is trained, the cross-entropy and the KL divergence from the teacher (0 without), nats per token; 1 - CKA of the layers
that are compared (0 where none are)."""


class TrainingError(PruneError):
    """Training cannot go on; the checkpoints written so far are whole."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did, the same on every rank.

    Attributes:
        losses: means over the global batch, before the update.
        grad_norm: before clipping; ``None`` if the update was left out.
        lr: that the update was made with.
        updated: whether there was one; with fp16 a step whose gradients overflow is left out.
        stop_asked: whether a rank was asked to stop.
    """

    losses: Measured
    grad_norm: float | None
    lr: float
    updated: bool
    stop_asked: bool


@dataclass(eq=False)
class Trainer:
    """The model in training with its optimizer.

    Args:
        teacher: whom the model is distilled from, if anyone.
        adapters: what is trained, where it is not the model itself.
        hidden: compares layers with the teacher's; it counts ``hidden_weight``.
        answers_only: whether the data says which tokens count.
    """

    running: RunningModel
    dtype: torch.dtype
    sizes: BatchSizes
    seq_length: int
    seed: int
    optimizer_options: OptimizerOptions
    teacher: Teacher | None = None
    distillation: Distillation = Distillation(weight=0.0)
    adapters: list[Adapter] = field(default_factory=list)
    hidden: HiddenMatch | None = None
    hidden_weight: float = 0.0
    answers_only: bool = False
    model: DistributedDataParallel = field(init=False)

    def __post_init__(self) -> None:
        config = self.running.module.config
        with cpu.stand_in():
            self.running.module.train()
            ddp = DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=torch.cuda.is_available(),
                overlap_param_gather=False,
            )
            self.model = DistributedDataParallel(config, ddp, self.running.module)
            self.optimizer, self.schedule = build_optimizer(
                self.optimizer_options, self.model, self.dtype, self.sizes.global_batch
            )
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.model.no_sync
        config.finalize_model_grads_func = finalize_model_grads

    def sharded_state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """megatron-core's description of the parameters that are trained."""
        if self.adapters:
            return {name: part for adapter in self.adapters for name, part in adapter.sharded_state().items()}
        return self.running.module.sharded_state_dict(metadata=metadata)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the parameters that ``dist_checkpointing`` read for a :meth:`sharded_state`."""
        if not self.adapters:
            self.running.module.load_state_dict(state, strict=True)
            return
        with torch.no_grad():
            for adapter in self.adapters:
                for name, parameter in adapter.named():
                    parameter.copy_(state[name])

    def step(self, dataset: Dataset, consumed: int, *, stop: bool) -> Step:
        """Train on the global batch after ``consumed`` samples.

        Args:
            stop: whether this rank was asked to stop.

        Raises:
            TrainingError: if the loss or the gradients are not finite.
        """
        with cpu.stand_in():
            self._seed(consumed)
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            batches = list(step_batches(dataset, consumed, self.sizes, self.running.config.vocab_size))
            sums = self._run(batches, self.teacher, train=True)
            totals, stop_asked = self._reduce(sums, stop)
            losses = _means(totals)
            if not math.isfinite(losses[0]):
                raise TrainingError(f"the loss of the step after {consumed} samples is {losses[0]}")
            lr = self._lr()
            updated, norm, _ = self.optimizer.step()
            if updated and not math.isfinite(norm):
                raise TrainingError(f"the gradient of the step after {consumed} samples is {norm}")
            if updated:
                self.schedule.step(increment=self.sizes.global_batch)
        return Step(losses=losses, grad_norm=norm, lr=lr, updated=updated, stop_asked=stop_asked)

    def evaluate(self, dataset: Dataset, iterations: int) -> Measured:
        """Mean losses over the first ``iterations`` global batches of ``dataset``: the same samples every time."""
        self.model.eval()
        totals = [0.0] * 5
        with cpu.stand_in(), torch.no_grad():
            for number in range(iterations):
                start = number * self.sizes.global_batch
                batches = list(step_batches(dataset, start, self.sizes, self.running.config.vocab_size))
                measured, _ = self._reduce(self._run(batches, None, train=False), False)
                totals = [total + value for total, value in zip(totals, measured)]
        self.model.train()
        return _means(totals)

    def _lr(self) -> float:
        groups = [group for group in self.optimizer.param_groups if group.get("default_config")]
        return float((groups or self.optimizer.param_groups)[0]["lr"])

    def _seed(self, consumed: int) -> None:
        """Random numbers of a step (dropout) depend on the seed and the position alone: nothing of them has to be kept."""
        copy, stage = parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        mixed = (self.seed * 1_000_003 + consumed) * 8191 + 97 * copy + stage
        model_parallel_cuda_manual_seed(mixed % (1 << 31))

    def _run(self, batches: list[tuple[Tensor, Tensor, range]], teacher: Teacher | None, *, train: bool) -> list[Tensor]:
        """Sums of every micro-batch (see :meth:`_weighted`), on the ranks of the last stage."""
        taught: Iterable[Any] = teacher.answers(batches) if teacher else [None] * len(batches)
        weight = self._weight(batches)
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=zip(batches, taught, itertools.repeat(weight)),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=self.seq_length,
            micro_batch_size=self.sizes.micro_batch,
            forward_only=not train,
        )

    def _forward(self, iterator: Iterable, model: torch.nn.Module) -> tuple[Tensor, Callable]:
        (tokens, labels, _), taught, weight = next(iterator)
        device = self.running.device
        tokens, labels = tokens.to(device), labels.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        parts: list[Tensor] = []
        self.running.module.compute_language_model_loss = partial(self._losses, taught, parts)
        output = model(input_ids=tokens, position_ids=positions, attention_mask=None, labels=labels)
        return output, partial(self._weighted, labels, weight, parts)

    def _weight(self, batches: list[tuple[Tensor, Tensor, range]]) -> float | None:
        """What the loss of a token that counts is multiplied by in its micro-batch, so that the step's loss is their mean over
        the global batch; ``None`` where all count alike."""
        if not self.answers_only:
            return None
        counted = torch.zeros(1, dtype=torch.float64, device=self.running.device)
        counted += sum(int((labels != IGNORED).sum()) for _, labels, _ in batches)
        dist.all_reduce(counted, group=parallel_state.get_data_parallel_group())
        return len(batches) * parallel_state.get_data_parallel_world_size() / max(counted.item(), 1.0)

    def _losses(self, taught: Callable | None, parts: list[Tensor], labels: Tensor, logits: Tensor) -> Tensor:
        """Called by megatron-core's model in place of its own loss: labels [batch, tokens], logits [tokens, batch, part]."""
        teacher = taught() if taught else None
        losses = vocab_parallel_losses(
            logits, labels.transpose(0, 1).contiguous(), self.running.config.vocab_size, teacher, self.distillation
        )
        total, matched = losses[0], torch.zeros((), device=logits.device)
        if teacher is not None and self.hidden:
            matched = self.hidden.loss()
            total = total + self.hidden_weight * matched
        parts.extend([total, *losses[1:], matched])
        return total

    @staticmethod
    def _weighted(labels: Tensor, weight: float | None, parts: list[Tensor], losses: Tensor) -> tuple[Tensor, Tensor]:
        """(what is trained, float64 [5]: sums of the four losses and of what they are sums over).

        Args:
            labels: int64 [batch, tokens].
            parts: the four losses, [tokens, batch] each, or of the whole micro-batch.
            losses: [tokens, batch].
        """
        counts = (labels != IGNORED).transpose(0, 1)
        total = counts.sum().double()
        sums = [(part.detach().double() * counts).sum() for part in parts]
        return losses.mean() if weight is None else (losses * counts).sum() * weight, torch.stack([*sums, total])

    def _reduce(self, sums: list[Tensor], stop: bool) -> tuple[list[float], bool]:
        """Sums over all micro-batches of all copies, on every rank; and whether any rank was asked to stop."""
        values = torch.zeros(6, dtype=torch.float64, device=self.running.device)
        if sums and parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
            values[:5] = torch.stack(sums).sum(0)
        values[5] = float(stop)
        dist.all_reduce(values)
        *totals, asked = values.tolist()
        return totals, asked > 0


def _means(totals: list[float]) -> Measured:
    """The four losses, of their sums and the number of tokens that count; 0 where none does."""
    *sums, counted = totals
    return tuple(total / counted if counted else 0.0 for total in sums)
