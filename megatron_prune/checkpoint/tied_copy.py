"""A stored copy of a tied output layer."""

from __future__ import annotations

import torch

from megatron_prune.arch.tensors import EMBEDDING
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.errors import CheckpointError
from megatron_prune.files.region import Scratch


def check_tied_copy(model: HuggingFaceModel) -> None:
    """Refuse a stored copy of a tied output layer that differs from the embedding.

    Raises:
        CheckpointError: if it does: one of the two would be lost.
    """
    embedding = EMBEDDING
    for (copy, _, _), (original, _, _) in zip(model.tensors.replicas.get(embedding, ()), model.tensors.tiles[embedding]):
        step = max(1, (64 << 20) // original.row_bytes)
        first, second = Scratch(), Scratch()
        for row in range(0, original.rows, step):
            rows = min(step, original.rows - row)
            left, right = (
                buffer.take("rows", rows * region.cols, region.dtype) for buffer, region in ((first, original), (second, copy))
            )
            original.part(row, rows).read_into(left)
            copy.part(row, rows).read_into(right)
            same = left.view(torch.uint8), right.view(torch.uint8)
            if copy.dtype != original.dtype:  # as transformers compares them: by value
                same = left.double(), right.double()
            if not torch.equal(*same):
                raise CheckpointError(
                    f"{model.path} ties its embeddings but stores an output layer that differs from them",
                    got="two models: transformers 5 computes with the stored output layer, transformers 4 with the embedding",
                    do='set "tie_word_embeddings" to false in config.json if the stored output layer is meant; '
                    "take it out of the weights if it is not",
                )
