"""What ranks of a pool run: plain functions of a module that spawned processes can import. Tensors travel as numpy."""

from __future__ import annotations

import importlib
import multiprocessing
from argparse import Namespace
from contextlib import contextmanager
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, Iterator

import numpy
import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.runtime import cpu
from megatron_prune.runtime.world import World


def forget_groups() -> None:
    """Take all process groups but the world down: megatron-core drops them, and each keeps its gloo threads for good."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is not distributed_c10d.GroupMember.WORLD:
            torch.distributed.destroy_process_group(group)


def run_steps(world: World, *steps: tuple[str, dict[str, Any]]) -> None:
    """``("prune", {"load": …})``: run ``steps/prune.py`` with these options, one step after another."""
    for name, options in steps:
        module = importlib.import_module(f"megatron_prune.steps.{name}")
        kind = getattr(module, "".join(part.capitalize() for part in name.split("_")) + "Options")
        getattr(module, name)(kind(**options), world)


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
"""What Python tells its audit hooks of files and directories (PEP 578)."""


def die_at_file_event(world: World, number: int, later: float, seen: Any, place: str, step: tuple[str, dict[str, Any]]) -> None:
    """Run a step, and be gone when it is about to do something for the ``number``-th time under ``place``.

    Args:
        later: seconds after that moment, so that a kill also lands in the middle of a write.
        seen: counts these moments; a shared integer.
    """
    import os
    import signal
    import sys
    import threading

    def hook(event: str, arguments: tuple) -> None:
        if event not in FILE_EVENTS or not any(
            str(each).startswith(place) for each in arguments if isinstance(each, (str, Path))
        ):
            return
        with seen.get_lock():
            seen.value += 1
            now = seen.value == number
        if now and later:
            threading.Timer(later, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif now:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run_steps(world, step)


def die_at_rename(world: World, number: int, step: tuple[str, dict[str, Any]]) -> None:
    """Run a step where directories cannot be exchanged (NFS, old kernels), and be gone just before a rename in ``commit``.

    Args:
        number: of the rename, 1-based; 0 lets the step finish.
    """
    import os

    from megatron_prune.files import moves

    left = [number]

    class Counting:
        def __getattr__(self, name):
            return getattr(os, name)

        def rename(self, *paths):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            os.rename(*paths)

    moves.exchange = lambda one, other: False
    moves.os = Counting()
    run_steps(world, step)


@contextmanager
def running(world: World, checkpoint: str, layout: ParallelLayout, seq_length: int) -> Iterator:
    """The checkpoint as our own running model in float32."""
    from megatron_prune.checkpoint import megatron
    from megatron_prune.runtime.model import build_model, stop_parallel

    tensors = megatron.open_checkpoint(Path(checkpoint)).tensors
    try:
        yield build_model(tensors, layout, world, dtype=torch.float32, seq_length=seq_length)
    finally:
        stop_parallel()
        forget_groups()


def logits(world: World, checkpoint: str, tokens: list[list[int]], tp: int, pp: int) -> numpy.ndarray | None:
    """[batch, tokens, vocabulary] on the ranks of the last stage, ``None`` on the others."""
    from megatron_prune.runtime.forward import full_logits

    with running(world, checkpoint, ParallelLayout(tensor=tp, pipeline=pp), len(tokens[0])) as model:
        out = full_logits(model, [torch.tensor(tokens)])
    return out[0].numpy() if out else None


def perplexity(world: World, checkpoint: str, windows: list[list[int]], tp: int, pp: int, micro_batch_size: int) -> float:
    """What ``evaluation/perplexity.py`` says."""
    from megatron_prune.evaluation import perplexity as module

    with running(world, checkpoint, ParallelLayout(tensor=tp, pipeline=pp), len(windows[0])) as model:
        return module.perplexity(model, torch.tensor(windows), world, micro_batch_size=micro_batch_size)


# --------------------------------------------------------------------------- megatron-core by itself, without our loader


@contextmanager
def stock_model(world: World, args: Namespace, tp: int, pp: int, impl: str = "local") -> Iterator[torch.nn.Module]:
    """megatron-core's GPTModel, float32, NaN everywhere, as ``args`` describe it.

    Args:
        impl: ``"local"``: its stock local layer spec; ``"transformer_engine"``: what stands in for the other.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    world.connect(always=True)
    parallel_state.initialize_model_parallel(tp, pp)
    by_layer = getattr(args, "heterogeneous_layers_config_encoded_json", None)
    kind = TransformerConfig
    if by_layer:
        kind = partial(HeterogeneousTransformerConfig, heterogeneous_layers_config_encoded_json=by_layer)
    config = kind(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    try:
        with cpu.stand_in():
            spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization="RMSNorm")
            if by_layer:
                spec = get_gpt_heterogeneous_layer_spec(config, use_te=False)
            if impl != "local":
                import te_layers

                spec = te_layers.layers(args.num_layers // pp, args.qk_layernorm)
            model = GPTModel(
                config,
                spec,
                vocab_size=padded(args, tp),
                max_sequence_length=32,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
                share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                position_embedding_type="rope",
            )
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            yield model
    finally:
        parallel_state.destroy_model_parallel()
        forget_groups()


def padded(args: Namespace, tp: int) -> int:
    """Rows of the embedding at this TP, by Megatron-LM's rule (``megatron/training/tokenizer``)."""
    multiple = args.make_vocab_size_divisible_by * tp
    return -(-args.vocab_size // multiple) * multiple


def _parameters(model: torch.nn.Module) -> dict[str, numpy.ndarray]:
    """All of them, under the names of local layers."""
    found = {}
    for name, parameter in model.named_parameters():
        for theirs, local in _LOCAL_NAMES.items():
            name = name.replace(theirs, local)
        found[name] = parameter.detach().numpy().copy()
    return found


_LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def load_stock(
    world: World, folder: str, args: dict[str, Any], tp: int, pp: int, impl: str = "local"
) -> dict[str, numpy.ndarray]:
    """Load a ``torch_dist`` folder with megatron-core's own loader → this rank's parameters."""
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    with stock_model(world, Namespace(**args), tp, pp, impl) as model:
        wanted = model.sharded_state_dict(prefix="", metadata={"singleton_local_shards": False})
        loaded = dist_checkpointing.load(wanted, folder)
        model.load_state_dict({name: value for name, value in loaded.items() if name in wanted}, strict=True)
        return _parameters(model)


def load_common(world: World, folder: str) -> dict[str, Any]:
    """``common.pt`` as megatron-core reads it."""
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    return vars(dist_checkpointing.load_common_state_dict(folder)["args"])


def open_then_load_common(world: World, folder: str) -> str:
    """Open a checkpoint with our reader, then read ``common.pt`` with megatron-core's → the type of its ``args``."""
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    from megatron_prune.checkpoint import megatron

    register_safe_globals()  # as importing megatron-core does
    megatron.open_checkpoint(Path(folder))
    return type(dist_checkpointing.load_common_state_dict(folder)["args"]).__name__


def load_legacy(world: World, folder: str, args: dict[str, Any], tp: int, pp: int, impl: str) -> dict[str, numpy.ndarray]:
    """Load this rank's own file of the legacy layout into the stock model, name by name."""
    from megatron.core import parallel_state
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    with stock_model(world, Namespace(**args), tp, pp, impl) as model:
        rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
        content = torch.load(Path(folder) / name / "model_optim_rng.pt", weights_only=True)
        model.load_state_dict(content["model"], strict=True)
        return _parameters(model)


def save_stock(
    world: World, folder: str, args: dict[str, Any], states: list[dict[str, numpy.ndarray]], tp: int, pp: int, singleton: bool
) -> None:
    """Fill the stock model of every rank from ``states`` and save it with megatron-core's own writer.

    Args:
        states: parameters by rank of the world (tensor-parallel ranks are neighbours).
    """
    from megatron.core import dist_checkpointing

    args = Namespace(**args)
    with stock_model(world, args, tp, pp) as model, _may_have_children(), _reports():
        mine = {name: torch.from_numpy(value) for name, value in states[world.rank].items()}
        missing, unexpected = model.load_state_dict(mine, strict=False)
        if unexpected or any(not name.endswith("_extra_state") for name in missing):
            raise AssertionError(f"the test's own shards do not fit the stock model: {missing}, {unexpected}")
        model.to(torch.bfloat16)
        state = model.sharded_state_dict(prefix="", metadata={"singleton_local_shards": singleton})
        if world.rank == 0:
            Path(folder).mkdir(parents=True)
        world.barrier()
        dist_checkpointing.save({**state, "args": args, "checkpoint_version": 3.0, "iteration": 5}, folder)


@contextmanager
def _reports() -> Iterator[None]:
    """The process through which megatron-core's writers report, forked: its own is spawned and imports everything again."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with SyncManager(ctx=multiprocessing.get_context("fork")) as manager:
        filesystem_async._results_queue = manager.Queue()
        yield


@contextmanager
def _may_have_children() -> Iterator[None]:
    """megatron-core's writer starts processes, which a pool's (daemonic) process may not; they must not outlive it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config = multiprocessing.current_process()._config
    before, config["daemon"] = config.get("daemon"), False
    try:
        yield
    finally:
        config["daemon"] = before
        filesystem_async._results_queue = None
        for child in multiprocessing.active_children():
            child.terminate()
            child.join()


def refusal(world: World, checkpoint: str, layout: ParallelLayout) -> str:
    """What a rank says when it builds a model from a checkpoint that it may not read."""
    from megatron_prune.checkpoint import megatron
    from megatron_prune.errors import CheckpointError
    from megatron_prune.runtime.model import build_model

    tensors = megatron.open_checkpoint(Path(checkpoint)).tensors
    try:
        build_model(tensors, layout, world, dtype=torch.float32, seq_length=8)
    except CheckpointError as error:
        return str(error)
    finally:
        stop(world)
    return "nothing"


def stop(world: World) -> None:
    """Take down what a failed job left."""
    from megatron_prune.runtime.model import stop_parallel

    stop_parallel()
    forget_groups()
