"""How Megatron-LM is to be started on a checkpoint that a step has written."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.megatron_lm_flags import contradictions, megatron_lm_flags, unknown_there
from megatron_prune.checkpoint.options import TRANSFORMER_IMPLS

log = logging.getLogger("megatron_prune")


def say_flags(
    load: Path,
    config: ModelConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    *,
    ckpt_format: str,
    transformer_impl: str = TRANSFORMER_IMPLS[0],
) -> None:
    """Log the arguments, to be pasted behind ``pretrain_gpt.py``, and warn of what they cannot say; or that it cannot run it."""
    if unknown := unknown_there(config):
        log.warning("Megatron-LM's pretrain_gpt.py cannot run this model: it has %s", ", ".join(unknown))
        bridge = ", and Megatron-Bridge's provider of the family" if config.is_uniform else ""
        log.warning("what can: recover, score, sample and evaluate of this project%s", bridge)
        return
    flags = megatron_lm_flags(config, layout, dtype, ckpt_format=ckpt_format, transformer_impl=transformer_impl)
    log.info("Megatron-LM's arguments for it: %s", shlex.join(["--load", str(load.absolute()), *flags]))
    for sentence in contradictions(config):
        log.warning("%s", sentence)
