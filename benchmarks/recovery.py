"""Recovery training: how fast it is beside the Hugging Face Trainer, and what is reached from which start.

    python benchmarks/recovery.py speed MODEL [--seq-length 256] [--batch 8] [--accumulate 1] [--steps 6] [--rounds 3]
        [--dtype fp32|bf16] [--output speed.json]
    python benchmarks/recovery.py curve MODEL --train TEXT --held-out TEXT --tokens N [--pruned CHECKPOINT | --ratio 0.33]
        [--seq-length 256] [--global-batch-size 16] [--micro-batch-size 4] [--lr 3e-4] [--bf16] [--out DIR] …

MODEL is a Hugging Face directory. ``speed`` trains it on the same random tokens with this project's trainer and with
``transformers.Trainer`` (which needs accelerate), in turn, each time in a process of its own with as many threads; steps are
timed after some to warm up. Printed: tokens a second and the ratio within a round (median, minimum, maximum), TFLOP/s, MFU
where the device's peak is known. Both must begin with the same loss.

``curve`` trains, by the product's own commands and on the same samples, schedule and seed: the pruned model; random weights
of its shape; adapters (LoRA) on the pruned model; the pruned model distilled from the unpruned one. Printed: held-out losses
over tokens, and where the pruned start reaches what the random start ends with. All is kept in --out: the same command goes
on where it was stopped. Any flag of ``megatron-prune prune`` can be given after ``--``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.checkpoint import huggingface, megatron, model_folder
from megatron_prune.cli.parser import parse
from megatron_prune.files import staging
from megatron_prune.planning.resources import training_flops
from megatron_prune.recovery import launch
from megatron_prune.recovery import settings as recovery_settings
from megatron_prune.recovery.data import BatchSizes, build_datasets
from megatron_prune.recovery.flags import filled
from megatron_prune.recovery.history import HISTORY, draw_losses, peak_flops, read_history
from megatron_prune.recovery.optimizer import OptimizerOptions
from megatron_prune.recovery.options import RULES, RecoverOptions
from megatron_prune.recovery.trainer import Trainer
from megatron_prune.runtime.layers import has_transformer_engine
from megatron_prune.runtime.model import build_model, stop_parallel
from megatron_prune.runtime.world import World
from megatron_prune.text.pair import open_pair

OURS, THEIRS = "megatron-prune", "transformers.Trainer"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPARED = {
    "fp32": "float32 everywhere, in both",
    "bf16": "megatron-prune: bfloat16 weights, with float32 gradients and float32 copies of the weights (Megatron's mixed "
    "precision); transformers.Trainer: bf16=True, float32 weights under autocast",
}
APART = {"fp32": 1e-3, "bf16": 5e-2}
"""How far the first losses may be apart, nats."""
ADAM = {"weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.95}
LR, EPS, CLIP = 1e-5, 1e-8, 1.0

ARMS = {
    "pruned": "pruned start",
    "random": "random start",
    "lora": "LoRA on the pruned start",
    "distilled": "distilled, from the pruned start",
}
POINTS = 20
"""Held-out losses of a curve, beside that of the start."""
CLAIM = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(required=True, metavar="speed|curve")
    add_speed(verbs.add_parser("speed", help="tokens a second beside transformers.Trainer"))
    add_curve(verbs.add_parser("curve", help="held-out loss over tokens, from every start"))
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    options.extra = argv[end + 1 :]
    options.run(options)


# Speed


def add_speed(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=speed)
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes in a step")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before, that are not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=None, help="also write all measurements to this JSON file")
    parser.add_argument("--side", default=None, choices=(OURS, THEIRS), help=argparse.SUPPRESS)


def speed(options: argparse.Namespace) -> None:
    """All rounds and the report; or, where a side is named, one measurement of it into ``--output``."""
    if options.side:
        Path(options.output).write_text(json.dumps(measure(options)))
        return
    config = huggingface.open_model(model_folder.resolve(options.model)).tensors.config
    if not 2 <= options.seq_length <= config.max_position_embeddings:
        raise SystemExit(f"--seq-length {options.seq_length}: this model takes 2 to {config.max_position_embeddings} tokens")
    if min(options.batch, options.accumulate, options.steps, options.warm_up, options.rounds) < 1:
        raise SystemExit("--batch, --accumulate, --steps, --warm-up and --rounds are at least 1")
    found: dict[str, list[dict]] = {OURS: [], THEIRS: []}
    for number in range(options.rounds):
        for side in found:
            found[side].append(measure_apart(side, options))
            print(f"round {number + 1}: {side} {found[side][-1]['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
    first = {side: each[0]["first_loss"] for side, each in found.items()}
    difference = abs(first[OURS] - first[THEIRS])
    if not difference <= APART[options.dtype]:  # not a number is no agreement either
        raise SystemExit(f"the two do not compute the same: losses of the first step {first}")
    report_speed(options, found, config)
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name not in ("run", "extra", "side", "output")}
        Path(options.output).write_text(json.dumps({"settings": settings, "measured": found}, indent=2) + "\n")


def measure_apart(side: str, options: argparse.Namespace) -> dict:
    """One measurement in a process of its own, on one device."""
    names = ("seq_length", "batch", "accumulate", "steps", "warm_up", "dtype", "threads")
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": device}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "speed", options.model, *flags, "--side", side, "--output", str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train with one side; what it was, how fast, how much memory, which losses."""
    torch.set_num_threads(options.threads)
    model = model_folder.resolve(options.model)
    vocab_size = huggingface.open_model(model).tensors.config.vocab_size
    steps = options.warm_up + options.steps
    shape = (steps * options.accumulate * options.batch, options.seq_length + 1)
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found = (train_ours if options.side == OURS else train_theirs)(options, model, tokens)
    seconds = found.pop("ended") - found.pop("began")
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **found,
        "seconds": seconds,
        "tokens_per_second": options.steps * options.accumulate * options.batch * options.seq_length / seconds,
        "peak_memory": peak,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} processor",
        "peak_flops": peak_flops(DTYPES[options.dtype]),
    }


def now() -> float:
    """The time, when the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train_ours(options: argparse.Namespace, model: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """Steps of this project's trainer."""
    batch = options.batch * options.accumulate
    tensors, dtype = huggingface.open_model(model).tensors, DTYPES[options.dtype]
    constant = {"lr": LR, "min_lr": LR, "lr_decay_style": "constant", "lr_warmup_iters": 0}
    trainer = Trainer(
        running=build_model(tensors, ParallelLayout(), World(), dtype=dtype, seq_length=options.seq_length),
        dtype=dtype,
        sizes=BatchSizes(global_batch=batch, micro_batch=options.batch),
        seq_length=options.seq_length,
        seed=0,
        optimizer_options=OptimizerOptions(
            **constant, **ADAM, lr_decay_iters=len(tokens) // batch, clip_grad=CLIP, adam_eps=EPS, initial_loss_scale=1.0
        ),
    )
    samples = [{"tokens": sample[:-1], "labels": sample[1:]} for sample in tokens]
    losses, began = [], 0.0
    for number in range(len(tokens) // batch):
        if number == options.warm_up:
            began = now()
        losses.append(trainer.step(samples, number * batch, stop=False).losses[0])
    ended = now()
    layers = "Transformer Engine" if has_transformer_engine() else "megatron-core's local layers"
    adam = type(trainer.optimizer.chained_optimizers[0].optimizer)
    how = f"{layers}, {adam.__module__}.{adam.__name__}"
    return {"began": began, "ended": ended, "first_loss": losses[0], "mean_loss": statistics.mean(losses), "how": how}


def train_theirs(options: argparse.Namespace, model: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """Steps of transformers' Trainer as it is, but for the order of the samples, which is not shuffled."""
    import transformers

    steps, noted = len(tokens) // (options.batch * options.accumulate), {}

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == options.warm_up:
                noted["began"] = now()

        def on_step_end(self, args, state, control, **_):
            if state.global_step == steps:
                noted["ended"] = now()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                noted.setdefault("first_loss", logs["loss"])

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_epsilon=EPS,
            max_grad_norm=CLIP,
            **ADAM,
            bf16=options.dtype == "bf16",
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            logging_first_step=True,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        student = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
        labels = [{"input_ids": sample[:-1], "labels": sample[1:], "shift_labels": sample[1:]} for sample in tokens]
        trainer = InOrder(model=student, args=arguments, train_dataset=labels, callbacks=[Clock()])
        done = trainer.train()
    adam = type(trainer.optimizer.optimizer)
    how = f"transformers {transformers.__version__}, {student.config._attn_implementation}, optim={arguments.optim.value}"
    return {**noted, "mean_loss": done.training_loss, "how": f"{how} ({adam.__module__}.{adam.__name__})"}


def report_speed(options: argparse.Namespace, found: dict[str, list[dict]], config: Any) -> None:
    """Print the table."""
    of = {side: each[0] for side, each in found.items()}
    size = f"{options.steps} steps after {options.warm_up}; sequence {options.seq_length}, batch {options.batch}"
    device = of[OURS]["device"] if torch.cuda.is_available() else f"{of[OURS]['device']}, {options.threads} threads"
    print(f"{Path(options.model).name}, {parameter_count(config):,} parameters; {size} × {options.accumulate}; {device}")
    print(f"precision: {COMPARED[options.dtype]}")
    for side, one in of.items():
        print(f"{side}: {one['how']}")
    print("| | tokens/s | TFLOP/s | MFU | peak memory, GB | loss of the first step | of all steps |")
    print("|---|---|---|---|---|---|---|")
    for side, each in found.items():
        speeds, one = [entry["tokens_per_second"] for entry in each], of[side]
        flops = statistics.median(speeds) * training_flops(config, options.seq_length)
        mfu = f"{flops / one['peak_flops']:.1%}" if one["peak_flops"] else "–"
        memory = max(entry["peak_memory"] for entry in each) / 1e9
        losses = f"{one['first_loss']:.5f} | {one['mean_loss']:.5f}"
        print(f"| {side} | {spread(speeds, ',.0f')} | {flops / 1e12:.3g} | {mfu} | {memory:.2f} | {losses} |")
    ratios = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in zip(found[OURS], found[THEIRS])]
    print(f"{OURS} / {THEIRS}: {spread(ratios, '.2f')} over {options.rounds} rounds")


def spread(values: list[float], form: str) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# Curve


def add_curve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=curve)
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("--train", nargs="+", required=True, help="what to train on, as megatron-prune preprocess takes it")
    parser.add_argument("--held-out", nargs="+", required=True, help="what to measure on")
    parser.add_argument("--tokens", type=int, required=True, help="to train on, in every arm")
    parser.add_argument("--pruned", default=None, help="Megatron checkpoint of the pruned model (default: prune MODEL)")
    parser.add_argument("--ratio", type=float, default=0.33, help="share of the parameters to remove")
    parser.add_argument("--nsamples", type=int, default=128, help="samples of the training text to prune on")
    parser.add_argument("--reconstruct", type=int, default=0, help="as in megatron-prune prune; 4 is its own default")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--eval-iters", type=int, default=10, help="global batches of held-out text, if there are as many")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the pruned start")
    parser.add_argument("--lr-random", type=float, default=1e-3)
    parser.add_argument("--lr-lora", type=float, default=1e-3)
    parser.add_argument("--lr-distilled", type=float, default=None, help="(default: --lr)")
    parser.add_argument("--lora-r", type=int, default=32)
    parser.add_argument("--lora-alpha", type=float, default=64)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", default="recovery_curve", help="directory that all is kept in")


def curve(options: argparse.Namespace) -> None:
    """Make what is missing, train what is not finished, and tell of it."""
    options.model = str(model_folder.resolve(options.model).absolute())
    work = Path(options.out).absolute()
    work.mkdir(parents=True, exist_ok=True)
    data = {name: preprocess(work, name, texts, options.model) for name, texts in texts_of(options).items()}
    starts = make_starts(work, data["train"], options)
    common = schedule(work, data, options)
    for arm in options.arms:
        train_arm(work, arm, [*common, *arm_flags(arm, starts, options)])
        result = write_result(work, options, None)
    result = write_result(work, options, dense_loss(work, [*common, *arm_flags("dense", starts, options)]))
    report_curve(result)


def texts_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name of a pair of files → what it is made of."""
    named = {"train": options.train, "held_out": options.held_out}
    return {name: [str(Path(text).absolute()) if Path(text).exists() else text for text in each] for name, each in named.items()}


def preprocess(work: Path, name: str, texts: list[str], model: str) -> Path:
    """Tokenise; the prefix of the pair."""
    (work / "data").mkdir(exist_ok=True)
    prefix = work / "data" / f"{name}_text_document"
    words = ["preprocess", "--input", *texts, "--save", work / "data" / name, "--tokenizer", model]
    make(work, name, words, prefix.with_suffix(".idx"))
    return prefix


def make_starts(work: Path, train: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The checkpoints that arms start from: dense, pruned, random."""
    dense, pruned = work / "dense", Path(options.pruned).absolute() if options.pruned else work / "pruned"
    make(work, "dense", ["convert", "--load", options.model, "--save", dense], dense)
    if not options.pruned:
        words = ["prune", "--load", dense, "--save", pruned, "--ratio", options.ratio, "--data", f"{train}:1"]
        words += ["--nsamples", options.nsamples, "--seq-length", options.seq_length, "--seed", options.seed]
        make(work, "pruned", [*words, "--reconstruct", options.reconstruct, *options.extra], pruned)
    starts = {"dense": dense, "pruned": pruned}
    if "random" in options.arms:
        exported, random = work / "pruned_hf", work / "random"
        make(work, "export", ["export", "--load", pruned, "--save", exported], exported)
        drawn = draw_random(exported, work / f"random_{options.seed}_hf", options.seed)
        make(work, "random", ["convert", "--load", drawn, "--save", random], random)
        starts["random"] = random
    return starts


def draw_random(like: Path, save: Path, seed: int) -> Path:
    """A model of the same shape, initialised as transformers does before training."""
    if save.is_dir():
        return save
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(like, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with tempfile.TemporaryDirectory(dir=save.parent) as folder:
        model.save_pretrained(Path(folder) / "model")
        (Path(folder) / "model").rename(save)
    return save


def schedule(work: Path, data: dict[str, Path], options: argparse.Namespace) -> list[object]:
    """The flags that all arms share."""
    step = options.global_batch_size * options.seq_length
    iterations = max(1, -(-options.tokens // step))
    every, available = max(1, round(iterations / POINTS)), open_pair(str(data["held_out"])).total // step
    if not available:
        print(f"the held-out text has less than one global batch of {step:,} tokens: parts of it count twice", file=sys.stderr)
    epochs = iterations * step / open_pair(str(data["train"])).total
    print(f"{iterations} steps of {step:,} tokens: {epochs:.2f} × the training text", flush=True)
    flags = {
        "train_data_path": data["train"],
        "valid_data_path": data["held_out"],
        "data_cache_path": work / "data" / "cache",
        "seq_length": options.seq_length,
        "seed": options.seed,
        "global_batch_size": options.global_batch_size,
        "micro_batch_size": options.micro_batch_size,
        "train_iters": iterations,
        "lr_decay_iters": iterations,
        "lr_warmup_iters": min(50, iterations // 10),
        "eval_interval": every,
        "eval_iters": max(1, min(options.eval_iters, available)),
        "save_interval": 5 * every,
        "log_interval": max(1, every // 5),
        "keep": 1,
    }
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [*words, *(["--bf16"] if options.bf16 else [])]


def rate(arm: str, options: argparse.Namespace) -> float:
    """Learning rate of an arm."""
    own = {"random": options.lr_random, "lora": options.lr_lora, "distilled": options.lr_distilled}
    return own.get(arm) or options.lr


def arm_flags(arm: str, starts: dict[str, Path], options: argparse.Namespace) -> list[object]:
    """The flags of one arm."""
    start = starts.get(arm, starts["pruned"])
    words = ["--load", start, "--lr", rate(arm, options), "--min-lr", rate(arm, options) / 10]
    if arm == "lora":
        words += ["--lora-r", options.lora_r, "--lora-alpha", options.lora_alpha]
    return [*words, "--teacher", starts["dense"]] if arm == "distilled" else words


def train_arm(work: Path, arm: str, flags: list[object]) -> None:
    """Run an arm to its end."""
    folder = work / "runs" / arm
    make(work, f"run_{arm}", ["recover", "--save", folder, *flags], folder, done=finished(folder))


def finished(folder: Path) -> bool:
    """Whether a training has come to its end."""
    summary = folder / launch.SUMMARY
    return summary.is_file() and json.loads(summary.read_text())["finished"]


def make(work: Path, name: str, words: list[object], made: Path, *, done: bool | None = None) -> None:
    """Run a command of the product, unless what it makes is there; its messages go to NAME.log.

    A signal reaches the command too: a training saves what it has and leaves.

    Args:
        done: whether ``made`` is whole (default: if it is there; most commands put it in place when it is).
    """
    command, record, log = [str(word) for word in words], work / f"{name}.command.json", work / f"{name}.log"
    if made.exists() if done is None else done:
        before = json.loads(record.read_text()) if record.is_file() else command
        if before != command:
            raise SystemExit(f"{made} was made by another command, see {record}: name another --out, or remove {made}")
        return
    record.write_text(json.dumps(command))
    print(f"{command[0]} → {name}; see {log}", flush=True)
    with open(log, "a", encoding="utf-8") as messages:
        process = subprocess.Popen([sys.executable, "-m", "megatron_prune", *command], stdout=messages, stderr=messages)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise SystemExit(f"stopped in {name}; the same command goes on from there") from None
    if code:
        raise SystemExit(f"megatron-prune {' '.join(command)}\nended with {code}:\n{log.read_text()[-4000:]}")


def dense_loss(work: Path, flags: list[object]) -> float:
    """Held-out loss of the unpruned model, by the trainer's own measure on the samples that the arms are measured on."""
    kept, words = work / "dense_loss.json", [str(word) for word in flags]
    if kept.is_file() and json.loads(kept.read_text())["flags"] == words:
        return json.loads(kept.read_text())["loss"]
    options = filled(parse(RecoverOptions, [*words, "--save", str(work / "runs" / "dense")], prog="recover"), RULES)
    world, dtype, batches = World(), recovery_settings.compute_dtype(options), options.global_batch_size
    tensors = megatron.open_checkpoint(Path(options.load)).tensors
    trainer = Trainer(
        running=build_model(tensors, ParallelLayout(), world, dtype=dtype, seq_length=options.seq_length),
        dtype=dtype,
        sizes=recovery_settings.batch_sizes(options),
        seq_length=options.seq_length,
        seed=options.seed,
        optimizer_options=recovery_settings.optimizer_options(options),
    )
    samples = (options.train_iters * batches, options.eval_iters * batches, options.eval_iters * batches)
    held_out = build_datasets(recovery_settings.data_options(options), samples, world)[1]
    loss = trainer.evaluate(held_out, options.eval_iters)[1]
    stop_parallel()
    world.disconnect()
    staging.write_text(kept, json.dumps({"flags": words, "loss": loss}))
    return loss


def write_result(work: Path, options: argparse.Namespace, dense: float | None) -> dict[str, Any]:
    """Everything that is known so far, as JSON and drawn."""
    arms = {arm: arm_result(work / "runs" / arm) for arm in ARMS if finished(work / "runs" / arm)}
    settings = {name: value for name, value in vars(options).items() if name != "run"}
    result = {"settings": settings, "dense_loss": dense, "arms": arms, **derived(arms)}
    staging.write_text(work / "curves.json", json.dumps(result, indent=2) + "\n")
    lines = {ARMS[arm]: [{"tokens": at, "held_out_loss": loss} for at, loss in one["held_out"]] for arm, one in arms.items()}
    if dense is not None:
        last = max(one["tokens"] for one in arms.values())
        lines["unpruned model"] = [{"tokens": at, "held_out_loss": dense} for at in (0, last)]
    draw_losses(lines, work / "curves.png")
    return result


def arm_result(folder: Path) -> dict[str, Any]:
    """Curves and figures of a finished arm."""
    summary, records = json.loads((folder / launch.SUMMARY).read_text()), read_history(folder / HISTORY)
    names = ("tokens", "start_loss", "best_loss", "tokens_per_second")
    return {
        **{name: summary[name] for name in names},
        "final_loss": summary["held_out_loss"],
        "lr": summary["settings"]["lr"],
        "held_out": [(entry["tokens"], entry["held_out_loss"]) for entry in records if "held_out_loss" in entry],
        "training": [(entry["tokens"], entry["loss"]) for entry in records if "loss" in entry],
    }


def derived(arms: dict[str, dict]) -> dict[str, Any]:
    """What the curves say together."""
    found: dict[str, Any] = {}
    if {"pruned", "random"} <= arms.keys():
        target, total = arms["random"]["final_loss"], arms["random"]["tokens"]
        at = next((tokens for tokens, loss in arms["pruned"]["held_out"] if loss <= target), None)
        share = None if at is None else at / total
        found["reached"] = {"loss": target, "tokens": at, "share": share, "holds": share is not None and share <= CLAIM}
    if {"pruned", "distilled"} <= arms.keys():
        found["distillation"] = {"plain": arms["pruned"]["final_loss"], "distilled": arms["distilled"]["final_loss"]}
    return found


def report_curve(result: dict[str, Any]) -> None:
    """Print the table and what follows from it."""
    arms = result["arms"]
    table = Table("tokens", *(ARMS[arm] for arm in arms), title="held-out loss, nats per token")
    losses = {arm: dict(one["held_out"]) for arm, one in arms.items()}
    for tokens in sorted({tokens for each in losses.values() for tokens in each}):
        table.add_row(f"{tokens:,}", *(f"{each[tokens]:.4f}" if tokens in each else "" for each in losses.values()))
    Console().print(table)
    print(f"unpruned model: {result['dense_loss']:.4f}")
    for arm, one in arms.items():
        figures = f"start {one['start_loss']:.4f}, end {one['final_loss']:.4f}, best {one['best_loss']:.4f}"
        print(f"{ARMS[arm]}: {figures}; learning rate {one['lr']:g}; {one['tokens_per_second']:,.0f} tokens/s")
    if "reached" in result:
        print(told(result["reached"], arms["random"]["tokens"]))
    if "distillation" in result:
        plain, distilled = result["distillation"].values()
        print(f"end of the pruned start, plain {plain:.4f}, distilled {distilled:.4f}: {distilled - plain:+.4f}")


def told(reached: dict[str, Any], total: int) -> str:
    """Where the pruned start is as good as the random start ever gets, in words."""
    end = f"what the random start ends with ({reached['loss']:.4f} after {total:,} tokens)"
    claim = f"claim: at most {CLAIM:.0%}, {'holds' if reached['holds'] else 'does not hold'}"
    if reached["tokens"] is None:
        return f"the pruned start does not reach {end}; {claim}"
    return f"the pruned start reaches {end} at {reached['tokens']:,} tokens, {reached['share']:.1%} of them; {claim}"


if __name__ == "__main__":
    main()
