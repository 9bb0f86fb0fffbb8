"""The mean cross-entropy of a sample's next tokens, in nats."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_prune.importance.objective import OBJECTIVES, Objective
from megatron_prune.importance.statistics import CROSS_ENTROPY
from megatron_prune.runtime.forward import mask_padding


@OBJECTIVES.register(CROSS_ENTROPY)
class CrossEntropy(Objective):
    """Of every token but the first."""

    def part(self, tokens: Tensor, length: int, output: Tensor) -> Tensor | None:
        if not parallel_state.is_pipeline_last_stage():
            return None
        logits = mask_padding(output, self.model)[:, : length - 1].float().transpose(0, 1).contiguous()
        labels = tokens[:, 1:length].transpose(0, 1).contiguous()
        return vocab_parallel_cross_entropy(logits, labels).mean()

    def terms(self, length: int) -> int:
        return length - 1
