"""What a verb that wrote something says at its end: where, how large, how long it took, and what comes next."""

from __future__ import annotations

import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint import model_folder
from megatron_prune.config import flag
from megatron_prune.files.hidden import kept_parts
from megatron_prune.runtime.reporting import log, shown_bytes, shown_time
from megatron_prune.runtime.world import World
from megatron_prune.verbs.table import options_of


def _under(ranks: int, command: str) -> str:
    """A command of ours as it is started on so many ranks."""
    return f"torchrun --nproc-per-node {ranks} -m megatron_prune {command}" if ranks > 1 else f"megatron-prune {command}"


CARRIED = ("tokenizer", "hf_dir", "believe", "vocab_size", "rotary_base", "ignore_args")
CARRIED += ("tensor_model_parallel_size", "pipeline_model_parallel_size", "prune_type", "target_family", "serve")
"""What is said of a model, its layout and the place of the result: a pruning that follows is to be told the same."""


def _pruning(options: Any, ranks: int, rest: str) -> str:
    """The pruning of a model of its kind, with what the verb before it was told of the model."""
    verb = "prune" if model_folder.is_megatron(Path(options.load)) else "prune-hf"
    command = f"{verb} --load {options.load} --save … {rest}"
    known = {item.name for item in fields(options_of(verb))}
    defaults = {item.name: item.default for item in fields(options)}
    for name in CARRIED:
        if name in known and name in defaults and (value := getattr(options, name)) != defaults[name]:
            words = value if isinstance(value, tuple) else (value,)
            command += f" {flag(name)} {shlex.join(map(str, words))}"
    return _under(ranks if verb == "prune" else 1, command)


NEXT = {
    "convert": lambda o, ranks: _under(
        o.target_tensor_parallel_size * o.target_pipeline_parallel_size, f"verify --load {o.save} --hf-dir {o.load}"
    ),
    "export": lambda o, ranks: None if o.adapter_only else f"megatron-prune inspect {o.save}",
    "transfer": lambda o, ranks: f"megatron-prune inspect {o.save}",
    "sample": lambda o, ranks: _pruning(o, ranks, f"--ratio 0.25 --data {o.save}"),
    "score": lambda o, ranks: _pruning(o, ranks, f"--ratio 0.25 --scores {o.save}"),
    "plan": lambda o, ranks: _pruning(o, ranks, f"--plan {o.save} --data …"),
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
"""Verb that writes → the command that most users give after it, of its options and the number of ranks that run; ``None``: none."""


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
        if following := NEXT[self._verb](self._options, self._world.size):
            log.info("next: %s", following)


def _files(save: Path) -> list[Path]:
    """What lies at a place, or begins with its name."""
    if save.is_dir():
        return [path for path in save.rglob("*") if path.is_file()]
    return [save] if save.is_file() else [path for path in save.parent.glob(f"{save.name}[_.]*") if path.is_file()]
