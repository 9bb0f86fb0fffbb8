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
from typing import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_prune.arch.blocks.block import spaces
from megatron_prune.arch.sharding import WORD_EMBEDDINGS
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError, raise_all
from megatron_prune.importance.backward import backward_passes
from megatron_prune.importance.gates import GateSums, owned
from megatron_prune.importance.gradient_sums import ParameterSums, TiedGradient
from megatron_prune.importance.metric import GATES, SAMPLE, GradientMetric
from megatron_prune.importance.objective import OBJECTIVES, Objective
from megatron_prune.importance.placed import Placed, placed_parameters
from megatron_prune.importance.statistics import Statistics, gradient_source, read_all, replace_file
from megatron_prune.importance.unit_gradients import SampleUnits, add_samples, add_units, blocks_of
from megatron_prune.importance.unit_sums import UnitTotals, add_gates, add_weights
from megatron_prune.runtime.model import RunningModel
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


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
    """Add to ``gradients.safetensors`` what it lacks of ``metrics``, one objective after the other; every process takes part.

    Args:
        tensors: the checkpoint that ``model`` was built from; metrics see weights as stored.
        progress: called with the number of tokens of a sample once this stage has run it forward.

    Raises:
        InputError: if the model computes in fp16, or has weights or gradients that are not finite, naming them.
    """
    path = statistics.folder / "gradients.safetensors"
    kept = read_all(path) if world.is_main else {}
    there = world.all_gather({key.rsplit(".", 2)[0] for key in kept})[0]
    for objective in sorted({name for metric in metrics for name in metric.objectives}):
        lacking = [m for m in metrics if objective in m.objectives and gradient_source(m.spelling, objective) not in there]
        if lacking:
            kept |= _summed(lacking, objective, tensors, model, calibration, world, progress)
            world.on_main(lambda: replace_file(path, kept))


def _summed(
    metrics: list[GradientMetric],
    objective: str,
    tensors: TensorMap,
    model: RunningModel,
    calibration: Calibration,
    world: World,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """What the units come to with the gradients of one objective; the same on every process."""
    placed, functional = list(placed_parameters(model)), OBJECTIVES.get(objective)(model)
    _check_weights(model, placed, world)
    mine = calibration.share(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    try:
        with _Hooks(model, tensors, placed, metrics, functional, mine) as hooks:
            backward_passes(mine, functional, progress)
    finally:
        functional.close()
    hooks.reduce(world)
    totals, samples = UnitTotals(model.config, objective), calibration.weights.sum().item()
    add_gates([metric for metric in metrics if GATES in metric.sums], model, hooks.gates, totals)
    add_samples(hooks.units, totals)
    summed = [metric for metric in metrics if metric.sums not in ({GATES}, {SAMPLE})]
    if weighing := [metric for metric in summed if not metric.reads_units]:
        add_weights(weighing, tensors, model, hooks.sums, samples, totals)
    if whole := [metric for metric in summed if metric.reads_units]:
        add_units(whole, tensors, model, hooks.sums, samples, totals)
    found: dict[str, Tensor] = {}
    for part in world.all_gather(totals.values):
        for key, value in part.items():
            found[key] = found[key] + value if key in found else value
    return found


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


class _Hooks:
    """The sums of this rank's parameters and gates, filled while the context is open.

    Attributes:
        sums: parts of this rank → their sums; a copy of tied embeddings on the last stage has none.
        gates: (finest axis of a block, layer) → sums over this rank's units.
        units: what metrics say of whole units sample by sample, one of each block.
    """

    def __init__(
        self,
        model: RunningModel,
        tensors: TensorMap,
        placed: list[Placed],
        metrics: list[GradientMetric],
        objective: Objective,
        calibration: Calibration,
    ):
        self._model, self._placed = model, placed
        self._wanted = frozenset().union(*(metric.sums for metric in metrics))
        self._weights = calibration.weights.tolist()
        self._terms = [objective.terms(length) for length in calibration.lengths.tolist()]
        self._watched = _watched([metric for metric in metrics if metric.sums == {SAMPLE}], tensors, model, placed)
        self.units = list(dict.fromkeys(self._watched.values()))
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
        if self._wanted == {GATES}:
            return _forget
        tied = part.tensor is WORD_EMBEDDINGS and self._model.config.tie_embeddings and self._model.layout.pipeline > 1
        if tied:
            self._tied = TiedGradient(part.parameter)
            if part.is_copy:
                return self._tied.send
        sums = ParameterSums(part.parameter, self._wanted - {GATES, SAMPLE}, self._weights)
        if units := self._watched.get((part.layer, part.tensor.name)):
            sums.show = partial(units.take, part)
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
        for layer, module in zip(layers, model.module.decoder.layers):
            self._finite[layer] = torch.ones((), dtype=torch.bool, device=model.device)
            self._handles.append(module.register_forward_hook(partial(_note_finite, self._finite[layer])))
            config = model.config.of_layer(layer)
            for kind in config.kinds if GATES in self._wanted else ():
                gate = GateSums(owned(kind.axes[0], kind, config), self._weights, self._terms)
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
        for units in self.units:
            for total in units.totals.values():
                dist.all_reduce(total, group=copies)
                if not total.isfinite().all():
                    broken.add((units.layer, f"layer {units.layer} units"))
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


def _watched(
    metrics: list[GradientMetric], tensors: TensorMap, model: RunningModel, placed: list[Placed]
) -> dict[tuple[int, str], SampleUnits]:
    """(layer, parameter) → what its gradients are shown to, of the blocks whose units the metrics judge."""
    found = {}
    for (layer, kind), parts in blocks_of(placed, model).items() if metrics else ():
        if any(axis in metric.axes for metric in metrics for axis in kind.axes):
            units = SampleUnits(metrics, tensors, model, layer, kind, parts)
            found |= {(layer, part.tensor.name): units for part in parts}
    return found


def _note_finite(finite: Tensor, module: nn.Module, given: object, output: tuple[Tensor, object]) -> None:
    """Forward hook of a layer; nothing waits for the device."""
    finite.logical_and_(output[0].detach().isfinite().all())


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None
