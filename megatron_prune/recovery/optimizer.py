"""megatron-core's distributed optimizer and its schedule of learning rate and weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), under Megatron's argument names.

    Lengths are in iterations.
    """

    lr: float
    min_lr: float
    lr_decay_style: str
    lr_warmup_iters: int
    lr_decay_iters: int
    weight_decay: float
    clip_grad: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    initial_loss_scale: float

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            InputError: naming the flag.
        """
        if not 0 <= self.min_lr <= self.lr:
            raise InputError("--min-lr", got=self.min_lr, needed=f"0 to --lr {self.lr}")
        if not 0 <= self.lr_warmup_iters < max(self.lr_decay_iters, 1):
            raise InputError(
                "--lr-warmup-iters", got=self.lr_warmup_iters, needed=f"below --lr-decay-iters {self.lr_decay_iters}"
            )


def build_optimizer(
    options: OptimizerOptions, model: DistributedDataParallel, dtype: torch.dtype, global_batch: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer of this rank's share, and its schedule, which counts samples."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        clip_grad=options.clip_grad,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        initial_loss_scale=options.initial_loss_scale,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, [model])
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):  # no fused one of Transformer Engine's or Apex's
            for group in part.optimizer.param_groups:
                group["fused"] = True
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters * global_batch,
        lr_decay_steps=options.lr_decay_iters * global_batch,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=options.lr_decay_iters * global_batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that there is after no step where there is none yet, to be saved or loaded into.

    megatron-core's own way makes a step for it, which a fused optimizer of Transformer Engine's or Apex's needs.
    """
    for part in optimizer.chained_optimizers:
        if len(part.optimizer.state):
            continue
        if not isinstance(part.optimizer, torch.optim.AdamW):
            part._init_optimizer_states_with_dummy_values()
            continue
        for parameter in (each for group in part.optimizer.param_groups for each in group["params"]):
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            part.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what ``dist_checkpointing`` read.

    megatron-core 0.16.1 forgets the step of torch's Adam twice (its own fused Adam keeps it elsewhere): it misses it among
    a parameter's tensors, and then hands all parameters one tensor, which each of them would count up.
    """
    for part in optimizer.chained_optimizers:
        part._set_main_param_and_optimizer_states = partial(_set_with_own, part, part._set_main_param_and_optimizer_states)
    optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        del part._set_main_param_and_optimizer_states
        for of_parameter in part.optimizer.state.values():
            if "step" in of_parameter:
                of_parameter["step"] = of_parameter["step"].clone()


def _set_with_own(
    part: MegatronOptimizer, set_states: Callable, parameter: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> None:
    set_states(parameter, {**part._get_main_param_and_optimizer_states(parameter), **tensors})
