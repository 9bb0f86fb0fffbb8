"""An intermediate-layer loss for models of any width: one minus the linear CKA of student and teacher.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, eq. 3) compares which tokens of a sequence are alike to each model. It
does not change when the stream is rotated or scaled, and needs no projection between widths (as a distillation loss:
Dasgupta & Cohn 2025, ICLR, "Improving Language Model Distillation through Hidden State Matching"). Tokens are divided by
their root mean square first, so that massive activations count like the rest.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_prune.errors import InputError


def layer_pairs(
    student_layers: int, teacher_layers: int, kept: list[int] | None, chosen: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Layers whose outputs are compared, (student's, teacher's), 0-based.

    A student's layer stands for the teacher's up to the next one that was kept, as re-fitting made it.

    Args:
        kept: the teacher's layers that the student kept; ``None`` if all.
        chosen: the student's layers; four that are evenly spread, the last among them, where none are named.

    Raises:
        InputError: if the models do not fit together, or a layer does not exist.
    """
    kept = list(range(student_layers)) if kept is None else kept
    if len(kept) != student_layers or kept[-1] >= teacher_layers:
        raise InputError(
            "--hidden-weight: the student was not cut from this teacher",
            got=f"{student_layers} layers, kept of {kept[-1] + 1} or more",
            needed=f"layers of the teacher's {teacher_layers}",
        )
    wrong = [layer for layer in chosen if not 0 <= layer < student_layers]
    if wrong:
        raise InputError("--hidden-layers", got=wrong, needed=f"0 to {student_layers - 1}")
    spread = chosen or tuple(sorted({(quarter * student_layers) // 4 - 1 for quarter in (1, 2, 3, 4)} - {-1}))
    ends = [*(layer - 1 for layer in kept[1:]), teacher_layers - 1]
    return [(layer, ends[layer]) for layer in spread]


class HiddenMatch:
    """Watches layers of both models; both run on one pipeline stage, the teacher after the student."""

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: list[tuple[int, int]]):
        self._split_sequence = student.config.sequence_parallel
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._pairs = pairs
        for own, theirs in pairs:
            student.decoder.layers[own].register_forward_hook(self._keep("student", own))
            teacher.decoder.layers[theirs].register_forward_hook(self._keep("teacher", theirs))

    def _keep(self, who: str, layer: int):
        def keep(module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
            self._seen[who, layer] = output[0]

        return keep

    def loss(self) -> Tensor:
        """Mean of 1 - CKA over the pairs and the sequences of the micro-batch, float32 scalar, alike on all ranks."""
        losses = []
        for own, theirs in self._pairs:
            student, teacher = self._seen.pop(("student", own)), self._seen.pop(("teacher", theirs))
            if self._split_sequence:  # the teacher's are whole
                student = gather_from_sequence_parallel_region(student, tensor_parallel_output_grad=False)
            losses.append(1.0 - linear_cka(student, teacher.detach()).mean())
        return torch.stack(losses).mean()


def linear_cka(one: Tensor, other: Tensor) -> Tensor:
    """Linear CKA, float32 [batch], of [tokens, batch, width] and [tokens, batch, another width]."""
    first, second = _similarities(one), _similarities(other)
    return (first * second).sum((1, 2)) / (first.norm(dim=(1, 2)) * second.norm(dim=(1, 2)))


def _similarities(hidden: Tensor) -> Tensor:
    """Centred Gram matrices of the tokens, float32 [batch, tokens, tokens]."""
    tokens = hidden.float().transpose(0, 1)
    tokens = tokens * tokens.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    tokens = tokens - tokens.mean(1, keepdim=True)
    return tokens @ tokens.transpose(1, 2)
