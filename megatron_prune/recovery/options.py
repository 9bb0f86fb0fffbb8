"""What ``recover`` asks, with the defaults that depend on others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.config import check_limits, flag, option
from megatron_prune.errors import InputError
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.recovery.flags import SEPARATE_DATA, Needs, filled
from megatron_prune.runtime.megatron_flags import MegatronFlags
from megatron_prune.runtime.options import LayoutOptions
from megatron_prune.writing.options import CheckOptions

DECAY_STYLES = ["cosine", "linear", "constant", "inverse-square-root"]


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How a forward and a backward pass of training run: what their memory and time follow from."""

    seq_length: int | None = option(
        "tokens in a sequence (default: 4096, or the model's context where that is shorter)", None, least=1, group="text"
    )
    micro_batch_size: int = option("sequences in a forward pass", 1, least=1, group="run")
    bf16: bool = option("compute in bfloat16, with float32 copies of the weights", False, group="run")
    fp16: bool = option("compute in float16, with float32 copies of the weights and a scaled loss", False, group="run")
    sequence_parallel: bool = option(
        "split activations between the tensor-parallel regions over the ranks too", False, group="expert"
    )
    recompute: bool = option("the same as --recompute-granularity full", False, group="expert")
    recompute_activations: bool = option("the same as --recompute-granularity selective", False, group="expert")
    recompute_granularity: str | None = option(
        "work out activations again: of attention, or of all", None, choices=["selective", "full"], group="expert"
    )
    recompute_method: str | None = option("which layers with full", None, choices=["uniform", "block"], group="expert")
    recompute_num_layers: int | None = option("layers in a unit (uniform) or of a stage (block)", None, least=1, group="expert")
    lora_r: int | None = option("train adapters of this rank alone (default: train the model)", None, least=1)


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(PassOptions, ForeignOptions, CheckOptions, LayoutOptions):
    """Win back what pruning cost: train a Megatron checkpoint, plain or distilled from the unpruned model."""

    FOREIGN: ClassVar = MegatronFlags(trains=True)
    EXAMPLES: ClassVar = {
        "all": "torchrun --nproc-per-node 3 -m megatron_prune recover --load ckpt/pruned --save ckpt/run --teacher ckpt/dense "
        "--data-path data/corpus_text_document --train-iters 100 --global-batch-size 64",
        "text": "--data-path 0.7 data/a_text_document 0.3 data/b_text_document --split 98,2,0",
        "how": "--lr 1e-4 --lr-warmup-iters 20 --teacher ckpt/dense",
        "run": "--bf16 --micro-batch-size 4 --save-interval 200",
    }

    load: str = option(
        "Megatron checkpoint to start from: its root, or an iteration directory", group="model", exists=True, positional=True
    )
    save: str = option("directory of the run; a run that was interrupted there goes on", group="model")
    train_iters: int = option("steps in all", least=1)

    data_path: tuple[str, ...] = option("prefixes of .bin/.idx pairs, each after its weight or all without", (), group="text")
    split: str | None = option("shares of the documents for training, validation, test (default: 969,30,1)", None, group="text")
    train_data_path: tuple[str, ...] = option("blend to train on, instead of --data-path", (), group="text")
    valid_data_path: tuple[str, ...] = option("blend that held-out losses are measured on", (), group="text")
    test_data_path: tuple[str, ...] = option("blend that the end is measured on", (), group="text")
    answers_only: bool = option("count the assistant's tokens alone: pairs of preprocess --answers-only", False, group="text")
    data_cache_path: str | None = option("directory for the indices of the data (default: in --save)", None, group="model")
    seed: int = option("seed of the order of the data and of dropout", 1234, least=0, group="run")

    global_batch_size: int = option("sequences in a step, over all data-parallel copies", 1024, least=1)
    lr: float = option("learning rate after the warm-up", 2.5e-5, above=0)
    min_lr: float | None = option("learning rate at the end (default: 1e-05)", None, least=0, group="expert")
    lr_decay_style: str = option("how it falls", "cosine", choices=DECAY_STYLES, group="expert")
    lr_decay_iters: int | None = option("steps over which it falls (default: all)", None, least=1, group="expert")
    lr_warmup_iters: int | None = option(
        "steps over which it rises (default: 50, or a tenth of all where that is less)", None, least=0
    )
    weight_decay: float = option("decoupled weight decay", 0.01, least=0, group="expert")
    clip_grad: float = option("norm that the gradient is cut down to; 0 for never", 1.0, least=0, group="expert")
    adam_beta1: float = option("decay of Adam's first moment", 0.9, least=0, below=1, group="expert")
    adam_beta2: float = option("decay of Adam's second moment", 0.95, least=0, below=1, group="expert")
    adam_eps: float = option("Adam's epsilon", 1e-8, least=0, group="expert")
    initial_loss_scale: float | None = option("of --fp16 (default: 131072)", None, above=0, group="expert")

    save_interval: int = option("steps between checkpoints; a held-out loss goes with each", 500, least=1, group="run")
    keep: int = option("newest checkpoints that stay, beside the best", 2, least=1, group="run")
    eval_interval: int | None = option("steps between held-out losses (default: --save-interval)", None, least=1, group="run")
    eval_iters: int = option("global batches that a held-out loss is measured on, the same every time", 10, least=1, group="run")
    early_stop: int = option(
        "end after so many held-out losses that are no better than the best; 0: never", 0, least=0, group="run"
    )
    log_interval: int = option("steps between lines of the log", 10, least=1, group="run")
    wandb_project: str | None = option("also log to this project of Weights & Biases", None, group="model")

    teacher: str | None = option("unpruned Megatron checkpoint to distil from, at the same TP × PP", None, exists=True)
    teacher_logits: str | None = option("distil from answers that megatron-prune teach kept, instead", None, exists=True)
    distill_weight: float | None = option(
        "share of the KL divergence from the teacher, beside cross-entropy (default: 0.5)", None, least=0, most=1
    )
    distill_temperature: float | None = option("temperature of both distributions (default: 1)", None, above=0)

    hidden_weight: float = option(
        "count 1 - CKA of layers' outputs and the teacher's so much beside; 0: not at all", 0.0, least=0, group="expert"
    )
    hidden_layers: tuple[int, ...] = option(
        "student's layers that are compared, 0-based (default: four evenly spread)", (), group="expert"
    )

    lora_alpha: float | None = option("an adapter counts this over its rank (default: 16)", None, above=0)
    lora_dropout: float | None = option("share of an adapter's inputs that training drops (default: 0)", None, least=0, below=1)
    lora_targets: tuple[str, ...] | None = option(
        "matrices with an adapter, as Hugging Face (q_proj …) or Megatron (linear_qkv …) calls them (default: all)", None
    )

    overwrite: bool = option("begin anew, removing what a run left in --save", False, group="run")
    megatron: dict[str, Any] = field(default_factory=dict)


FREE = {
    *("load", "save", "data_cache_path", "micro_batch_size", "save_interval", "keep", "eval_interval", "eval_iters"),
    *("early_stop", "log_interval", "wandb_project", "sequence_parallel", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "overwrite", "no_check", "megatron"),
    *(item.name for item in dataclasses.fields(RecoverOptions) if item.name.startswith("recompute")),
    *(item.name for item in dataclasses.fields(ForeignOptions)),
}
"""What may change when a run goes on; the rest is what the run is."""


_DECAYS = Needs("a --lr-decay-style that falls", lambda o: o.lr_decay_style != "constant", None)


_TEACHER = Needs("--teacher or --teacher-logits", lambda o: o.teacher or o.teacher_logits, None)


_LORA = Needs("--lora-r", lambda o: o.lora_r is not None, None)


RULES = {
    **SEPARATE_DATA,
    "min_lr": _DECAYS._replace(default=1e-5),
    "lr_decay_iters": _DECAYS._replace(default=lambda o: o.train_iters),
    "initial_loss_scale": Needs("--fp16", lambda o: o.fp16, 2.0**17),
    "distill_weight": _TEACHER._replace(default=0.5),
    "distill_temperature": _TEACHER._replace(default=1.0),
    "hidden_layers": Needs("a --hidden-weight above 0", lambda o: o.hidden_weight, ()),
    "lora_alpha": _LORA._replace(default=16.0),
    "lora_dropout": _LORA._replace(default=0.0),
    "lora_targets": _LORA._replace(default=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")),
}
"""Flags that have an effect beside others alone, and their defaults."""


def filled_options(options: RecoverOptions, config: ModelConfig) -> RecoverOptions:
    """The options with the defaults that depend on others."""
    check_limits(options)
    options = filled(options, RULES)
    chosen: dict[str, Any] = {"load": str(Path(options.load).absolute())}
    if options.seq_length is None:
        chosen["seq_length"] = min(4096, config.max_position_embeddings)
    if options.lr_warmup_iters is None:
        chosen["lr_warmup_iters"] = min(50, options.train_iters // 10)
    if options.eval_interval is None:
        chosen["eval_interval"] = options.save_interval
    return replace(options, **chosen, **recomputation(options))


def recomputation(options: PassOptions) -> dict[str, Any]:
    """What is worked out again, by the names of the options, with the defaults that depend on others.

    Raises:
        InputError: if two options say how much, whether they agree or not.
    """
    said = [name for name in ("recompute", "recompute_activations", "recompute_granularity") if getattr(options, name)]
    if len(said) > 1:
        raise InputError(f"{' and '.join(map(flag, said))} both say what is worked out again", do="give one of the two")
    short = dict.fromkeys(("recompute", "recompute_activations"), False)  # said by the other from here on
    if options.recompute or options.recompute_granularity == "full":
        method, layers = options.recompute_method or "uniform", options.recompute_num_layers or 1
        return {**short, "recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    selective = options.recompute_granularity or ("selective" if options.recompute_activations else None)
    return {**short, "recompute_granularity": selective}


def check_passes(options: PassOptions, layout: ParallelLayout, layers: int) -> None:
    """Refuse what does not go together.

    Args:
        options: with their defaults.
        layers: of the model.

    Raises:
        InputError: naming the flags.
    """
    if options.sequence_parallel and options.seq_length % layout.tensor:
        raise InputError(
            "--sequence-parallel", got=f"{options.seq_length} tokens", needed=f"a multiple of the {layout.tensor} ranks"
        )
    if options.sequence_parallel and layout.tensor == 1:
        raise InputError("--sequence-parallel has no effect at one tensor-parallel rank", do="leave it out")
    if options.bf16 and options.fp16:
        raise InputError("--bf16 and --fp16", do="choose one")
    how, stage = (options.recompute_method, options.recompute_num_layers), layers // layout.pipeline
    if options.recompute_granularity != "full" and how != (None, None):
        raise InputError("--recompute-method and --recompute-num-layers", do="pass --recompute-granularity full with them")
    if options.recompute_num_layers and options.recompute_num_layers > stage:
        raise InputError("--recompute-num-layers", got=options.recompute_num_layers, needed=f"at most a stage's {stage} layers")
    if options.recompute_method == "uniform" and stage % options.recompute_num_layers:
        raise InputError(
            "--recompute-num-layers", got=options.recompute_num_layers, needed=f"a number that divides {stage} layers"
        )
