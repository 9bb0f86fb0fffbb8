"""megatron-prune: turn a pretrained language model into a smaller one, on tensor-parallel shards.

``import megatron_prune as mp`` gives the functions of :mod:`megatron_prune.api`; they, and torch, are imported when first used.
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    *("apply", "convert", "evaluate", "export", "metric", "plan", "prune", "recover", "score", "trim_vocabulary"),
    *("InputError", "Metric", "Plan"),
]


def __getattr__(name: str):
    if name == "InputError":
        return importlib.import_module("megatron_prune.errors").InputError
    if name in __all__:
        return getattr(importlib.import_module("megatron_prune.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__])
