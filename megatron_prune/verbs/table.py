"""The verbs, in the order of a user's path, and where the options of each are."""

from __future__ import annotations

import importlib

VERBS = {
    "convert": "Hugging Face → Megatron",
    "export": "Megatron → Hugging Face",
    "transfer": "change TP, PP, format or dtype of a Megatron checkpoint",
    "verify": "compare logits of a Megatron checkpoint under TP with the Hugging Face model",
    "sample": "text that a Megatron checkpoint makes itself, kept as calibration data",
    "score": "measure a model of either kind on text and keep the scores of every axis",
    "plan": "choose what stays of a model of either kind, as a file to read and edit",
    "prune": "score, plan and cut a Megatron checkpoint",
    "prune-hf": "the same cuts on a Hugging Face model, single process, without Megatron",
    "preprocess": "text → Megatron .bin/.idx pairs, to train on",
    "teach": "a teacher's most probable tokens, kept for distilling without it",
    "recover": "train a pruned Megatron checkpoint: plain, distilled, or adapters alone",
    "vocab count": "a corpus → how often it uses every token",
    "vocab select": "counts → the tokens that stay: a report and a plan",
    "vocab trim": "cut the vocabulary of a model of either kind, its tokenizer with it",
    "vocab remap": "tokenised data (.bin/.idx) → the same for a trimmed vocabulary",
    "evaluate": "perplexity of a model of either kind, under TP × PP",
    "compare": "before/after table of two Hugging Face models",
    "inspect": "shape, layout, parameters, bytes, recipe of a checkpoint; its broken weights",
    "estimate": "memory per rank and disk of a conversion, every part of a pruning, and a recovery",
}
"""verb → one line of help."""


def module_of(verb: str) -> str:
    """Name of a verb's file in ``verbs/`` and ``steps/``, and of the function there."""
    return verb.replace("-", "_").replace(" ", "_")


def options_of(verb: str) -> type:
    """The dataclass of a verb's options."""
    name = module_of(verb)
    module = importlib.import_module(f"megatron_prune.verbs.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")) + "Options")
