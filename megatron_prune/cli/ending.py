"""What a verb that wrote something says at its end: where, how large, how long it took, and what comes next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint import model_folder
from megatron_prune.files.hidden import kept_parts
from megatron_prune.runtime.reporting import log, shown_bytes, shown_time
from megatron_prune.runtime.world import World


def _under(ranks: int, command: str) -> str:
    """A command of ours as it is started on so many ranks."""
    return f"torchrun --nproc-per-node {ranks} -m megatron_prune {command}" if ranks > 1 else f"megatron-prune {command}"


def _pruner(load: str) -> str:
    """The verb that prunes a model of its kind."""
    path = Path(load)
    return "prune" if path.is_dir() and not model_folder.is_huggingface(path) else "prune-hf"


NEXT = {
    "convert": lambda o, ranks: _under(
        o.target_tensor_parallel_size * o.target_pipeline_parallel_size, f"verify --load {o.save} --hf-dir {o.load}"
    ),
    "export": lambda o, ranks: f"megatron-prune inspect {o.save}",
    "transfer": lambda o, ranks: f"megatron-prune inspect {o.save}",
    "sample": lambda o, ranks: _under(ranks, f"prune --load {o.load} --save … --ratio 0.25 --data {o.save}"),
    "score": lambda o, ranks: _under(ranks, f"prune --load {o.load} --save … --ratio 0.25 --scores {o.save}"),
    "plan": lambda o, ranks: _under(ranks, f"{_pruner(o.load)} --load {o.load} --save … --plan {o.save} --data …"),
    "prune": lambda o, ranks: f"megatron-prune export --load {o.save} --save …",
    "prune-hf": lambda o, ranks: f"megatron-prune compare --before {o.load} --after {o.save}",
    "preprocess": lambda o, ranks: (
        f"megatron-prune recover --load … --save … --train-iters 100 --data-path {o.save}_{o.json_keys[0]}_document"
    ),
    "teach": lambda o, ranks: _under(ranks, f"recover --teacher-logits {o.save} --load … --save … --train-iters {o.train_iters}"),
    "recover": lambda o, ranks: f"megatron-prune export --load {o.save}/best --save …",
    "vocab count": lambda o, ranks: f"megatron-prune vocab select --load {o.tokenizer} --counts {o.save} --coverage 0.9999",
    "vocab select": lambda o, ranks: f"megatron-prune vocab trim --load {o.load} --plan {o.save_plan} --save …",
    "vocab trim": lambda o, ranks: f"megatron-prune inspect {o.save}",
    "vocab remap": lambda o, ranks: f"megatron-prune recover --load … --save … --train-iters 100 --data-path {o.save}",
}
"""Verb that writes → the command that most users give after it, of its options and the number of ranks that run."""


class Ending:
    """The clock of one verb, started when it is made."""

    def __init__(self, verb: str, options: Any, world: World):
        self._verb, self._options, self._world, self._start = verb, options, world, time.monotonic()

    def say(self) -> None:
        """On the main process, of a verb that wrote what ``--save`` (or ``--save-plan`` alone) names."""
        save = getattr(self._options, "save", None) or getattr(self._options, "save_plan", None)
        if self._verb not in NEXT or save is None or not self._world.is_main:
            return
        files = _files(Path(save))
        if not files:
            return
        size, seconds = sum(path.stat().st_size for path in files), time.monotonic() - self._start
        log.info("%s: %s in %s", save, shown_bytes(size), shown_time(seconds))
        if kept := kept_parts(Path(save)):
            log.info("%s holds what a stopped run of another request had finished: give that again, or remove it", kept)
        log.info("next: %s", NEXT[self._verb](self._options, self._world.size))


def _files(save: Path) -> list[Path]:
    """What lies at a place, or begins with its name."""
    if save.is_dir():
        return [path for path in save.rglob("*") if path.is_file()]
    return [save] if save.is_file() else [path for path in save.parent.glob(f"{save.name}[_.]*") if path.is_file()]
