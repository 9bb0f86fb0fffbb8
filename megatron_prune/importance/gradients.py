"""Forward and backward passes over the calibration text, for metrics that weigh weights with their gradients.

One sample is one micro-batch of megatron-core's schedule, and a hook on every parameter takes the sample's gradient away as
soon as it is whole, into float32 sums. So gradients are per sample at any TP × PP × DP, and only one is in memory. The
schedule runs backward passes in the order of the samples, so the n-th call of a hook is sample n.

What a rank's gradient lacks is added before it is squared: the weights of q and k norms act on this rank's heads only, so
theirs are summed over tensor-parallel ranks; tied embeddings that are held by the first and by the last stage have one
gradient, so the last stage sends its part, sample by sample, to the first.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, nn

from megatron_prune.arch.blocks.block import spaces
from megatron_prune.arch.sharding import WORD_EMBEDDINGS
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError, raise_all
from megatron_prune.importance.gates import GateSums, owned
from megatron_prune.importance.gradient_sums import ParameterSums, TiedGradient
from megatron_prune.importance.metric import GradientMetric
from megatron_prune.importance.placed import Placed, placed_parameters
from megatron_prune.importance.statistics import Statistics, read_all, replace_file
from megatron_prune.importance.unit_sums import Totals, add_gates, add_weights
from megatron_prune.runtime import cpu
from megatron_prune.runtime.forward import mask_padding
from megatron_prune.runtime.model import RunningModel
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration

GATES = "gates"


def collect_gradients(
    metrics: list[GradientMetric],
    tensors: TensorMap,
    model: RunningModel,
    calibration: Calibration,
    statistics: Statistics,
    world: World,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Add to ``gradients.safetensors`` what it lacks of ``metrics``; every process takes part.

    Args:
        tensors: the checkpoint that ``model`` was built from; metrics see weights as stored.
        progress: called with the number of tokens of a sample once this stage has run it forward.

    Raises:
        InputError: if the model computes in fp16, or has weights or gradients that are not finite, naming them.
    """
    path = statistics.folder / "gradients.safetensors"
    kept = read_all(path) if world.is_main else {}
    there = world.all_gather({key.partition(".")[0] for key in kept})[0]
    metrics = [metric for metric in metrics if metric.name not in there]
    if not metrics:
        return
    placed = list(placed_parameters(model))
    _check_weights(model, placed, world)
    mine = calibration.share(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    with _Hooks(model, placed, metrics, mine) as hooks:
        backward_passes(model, mine, progress)
    hooks.reduce(world)
    totals: Totals = {}
    add_gates([metric for metric in metrics if GATES in metric.sums], model, hooks.gates, totals)
    weighing = [metric for metric in metrics if metric.sums != {GATES}]
    if weighing:
        add_weights(weighing, tensors, model, hooks.sums, calibration.weights.sum().item(), totals)
    found = dict(kept)
    for part in world.all_gather(totals):
        for key, value in part.items():
            found[key] = found[key] + value if key in found else value
    world.on_main(lambda: replace_file(path, found))


def _check_weights(model: RunningModel, placed: list[Placed], world: World) -> None:
    if model.module.config.params_dtype is torch.float16:
        raise InputError(
            "metrics that need gradients cannot compute in fp16",
            got="small gradients become zero there",
            do="compute with --dtype bf16 or fp32, or use a metric that needs none (activation, wanda, obs)",
        )
    broken = [str(part) for part in placed if not part.parameter.isfinite().all()]
    raise_all(
        InputError,
        "there are no gradients where weights are not finite (NaN or infinity)",
        sorted({name for names in world.all_gather(broken) for name in names}),
        do="mend the checkpoint (megatron-prune inspect --weights names them), or use a metric of weights only",
    )


def backward_passes(model: RunningModel, calibration: Calibration, progress: Callable[[int], None]) -> None:
    """Every sample forward and backward, padding left out of its loss."""
    count = len(calibration.tokens)
    if not count:
        return
    longest = int(calibration.lengths.max())

    def step(iterator: Iterator[tuple[Tensor, int]], module: nn.Module):
        tokens, length = next(iterator)
        tokens = tokens[None, :longest].to(model.device)
        positions = torch.arange(longest, device=model.device)[None]
        output = module(input_ids=tokens, position_ids=positions, attention_mask=None)
        progress(length)
        return output, partial(loss, tokens, length)

    def loss(tokens: Tensor, length: int, output: Tensor):
        logits = mask_padding(output, model)[:, : length - 1].float().transpose(0, 1).contiguous()
        labels = tokens[:, 1:length].transpose(0, 1).contiguous()
        mean = vocab_parallel_cross_entropy(logits, labels).mean()
        return mean * count, mean.detach()  # the schedule divides by the number of micro-batches

    with cpu.stand_in(), torch.enable_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(zip(calibration.tokens, calibration.lengths.tolist())),
            model=model.module,
            num_microbatches=count,
            seq_length=longest,
            micro_batch_size=1,
            forward_only=False,
        )


class _Hooks:
    """The sums of this rank's parameters and gates, filled while the context is open.

    Attributes:
        sums: parts of this rank → their sums; a copy of tied embeddings on the last stage has none.
        gates: (finest axis of a block, layer) → sums over this rank's units.
    """

    def __init__(self, model: RunningModel, placed: list[Placed], metrics: list[GradientMetric], calibration: Calibration):
        self._model, self._placed = model, placed
        self._wanted = frozenset().union(*(metric.sums for metric in metrics))
        self._weights, self._lengths = calibration.weights.tolist(), calibration.lengths.tolist()
        self.sums: list[tuple[Placed, ParameterSums]] = []
        self.gates: dict[tuple[str, int], GateSums] = {}
        self._finite: dict[int, Tensor] = {}

    def __enter__(self) -> _Hooks:
        self._required = [part.parameter.requires_grad for part in self._placed]
        self._handles, self._tied = [], None
        weighing = bool(self._wanted - {GATES})
        for part in self._placed:
            # gates alone need a gradient that reaches the embedding, and none of any weight
            part.parameter.requires_grad_(weighing or part.tensor is WORD_EMBEDDINGS)
            if not part.parameter.requires_grad:
                continue
            self._handles.append(part.parameter.register_post_accumulate_grad_hook(self._hook(part)))
        self._watch_layers()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for part, required in zip(self._placed, self._required):
            part.parameter.requires_grad_(required)
            part.parameter.grad = None
        if self._tied is not None:
            self._tied.close()

    def _hook(self, part: Placed) -> Callable[[nn.Parameter], None]:
        wanted = self._wanted - {GATES}
        if not wanted:
            return _forget
        tied = part.tensor is WORD_EMBEDDINGS and self._model.config.tie_embeddings and self._model.layout.pipeline > 1
        if tied:
            self._tied = TiedGradient(part.parameter)
            if part.is_copy:
                return self._tied.send
        sums = ParameterSums(part.parameter, wanted, self._weights)
        self.sums.append((part, sums))
        if tied:
            sums.complete = self._tied.add
        elif spaces(part.tensor.roles[0]) == ("head_dim",) and self._model.layout.tensor > 1:
            sums.complete = partial(dist.all_reduce, group=parallel_state.get_tensor_model_parallel_group())
        return sums.add

    def _watch_layers(self) -> None:
        model = self._model
        stage = parallel_state.get_pipeline_model_parallel_rank()
        layers = model.layout.stage_layers(stage, model.config.num_layers)
        predicted = [length - 1 for length in self._lengths]
        for layer, module in zip(layers, model.module.decoder.layers):
            self._finite[layer] = torch.ones((), dtype=torch.bool, device=model.device)
            self._handles.append(module.register_forward_hook(partial(_note_finite, self._finite[layer])))
            config = model.config.of_layer(layer)
            for kind in config.kinds if GATES in self._wanted else ():
                gate = GateSums(owned(kind.axes[0], kind, config), self._weights, predicted)
                writer = module.get_submodule(kind.tensor_of(kind.writer).module)
                self._handles.append(writer.register_forward_pre_hook(gate.watch))
                self.gates[kind.axes[0], layer] = gate

    def reduce(self, world: World) -> None:
        """Sum over data-parallel copies, and refuse what is not finite.

        Raises:
            InputError: naming the first layer whose output is not finite, or the tensors whose gradients are not.
        """
        lowest = min((layer for layer, finite in self._finite.items() if not finite), default=self._model.config.num_layers)
        broken_layer = min(world.all_gather(lowest))
        if broken_layer < self._model.config.num_layers:
            raise InputError(
                f"the output of layer {broken_layer} is not finite (NaN or infinity) on this text",
                do="look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32",
            )
        copies = parallel_state.get_data_parallel_group()
        broken: set[tuple[float, str]] = set()
        for part, sums in self.sums:
            for value in sums.values.values():
                dist.all_reduce(value, group=copies)
            if not all(value.isfinite().all() for value in sums.values.values()):
                broken.add((part.depth, str(part)))
        for (axis, layer), gate in self.gates.items():
            config = self._model.config.of_layer(layer)
            gate.total = self._whole_gate(AXES.get(axis).count(config), gate)
            dist.all_reduce(gate.total, group=copies)
            if not gate.total.isfinite().all():
                broken.add((layer, f"layer {layer} input of {config.block_of(axis).writer}"))
        everywhere = sorted(set().union(*world.all_gather(broken)), key=lambda item: (-item[0], item[1]))
        raise_all(
            InputError,
            "gradients that are not finite (NaN or infinity) on this text, in the order in which they were computed:",
            [name for _, name in everywhere],
            do="look for weights of extreme size, or use a metric that needs no gradients",
        )

    def _whole_gate(self, units: int, gate: GateSums) -> Tensor:
        """The sums of a gate that saw no sample (a copy without any) are zeros."""
        if gate.total is not None:
            return gate.total
        return torch.zeros(units // self._model.layout.tensor, dtype=torch.float64, device=self._model.device)


def _note_finite(finite: Tensor, module: nn.Module, given: object, output: tuple[Tensor, object]) -> None:
    """Forward hook of a layer; nothing waits for the device."""
    finite.logical_and_(output[0].detach().isfinite().all())


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None
