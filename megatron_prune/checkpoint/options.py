"""As what a Megatron checkpoint may be written, in the words of options, and how."""

from __future__ import annotations

FORMATS = ["torch_dist", "torch"]
"""Layouts of its files: megatron-core's distributed one, and the one of a file for each rank."""

TRANSFORMER_IMPLS = ["transformer_engine", "local"]
"""Megatron-LM's words for whose modules its layers are made of; the first is its default."""

WORKERS = 2
"""Tensors that a process streams at a time."""
