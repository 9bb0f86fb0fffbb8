"""Measure a model of either kind on text and keep every axis's scores, to make any number of plans from."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES, layer_axes
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.importance.artifact import FILE, ScoresManifest, save_scores
from megatron_prune.importance.metric import METRICS, metric_named
from megatron_prune.importance.parameters import separate
from megatron_prune.importance.scoring import all_scores
from megatron_prune.opening.opened import open_to_run
from megatron_prune.opening.source import PARAM_DTYPES
from megatron_prune.planning.plan import shape_of
from megatron_prune.pruning.asked import metrics_of
from megatron_prune.pruning.costs import measured_costs, needed_moments
from megatron_prune.pruning.engines.choice import engine_of
from megatron_prune.pruning.measure import (
    Subject,
    check_measurable,
    check_text,
    measure,
    obtain_calibration,
    request_key,
)
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.verbs.score import ScoreOptions
from megatron_prune.writing.overwrite import SCORES, check_output


def score(options: ScoreOptions, world: World) -> None:
    """Run the step; every process takes part. An interrupted run goes on where it was when it is started again.

    Raises:
        InputError: on metrics, data, a checkpoint or a layout that do not fit; nothing is written.
    """
    save, metrics = Path(options.save), metric_names(options.metrics)
    check_output(save, SCORES, overwrite=options.overwrite, source=Path(options.load), inputs=(options.tokenizer,))
    model = open_to_run(options.load, world, options, tokenizer=options.tokenizer)
    engine = engine_of(model, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    engine.check_metrics(metrics)
    layout, subject = engine.layout, Subject(model=model, engine=engine, tokenizer=model.tokenizer)
    check_text(options, subject)
    check_measurable(options, metrics, model.config, layout)
    choosing = choosing_metrics(metrics) if options.costs else {}
    key = request_key(options, subject, metrics=metrics, costs=options.costs)
    with staging.work(save, key, main=world.is_main, agree=world.agree) as folder:
        calibration = obtain_calibration(options, subject, folder)
        moments = frozenset().union(*(metric_named(name).moments.values() for name in metrics))
        moments |= needed_moments(model.config) if options.costs else frozenset()
        statistics = measure(metrics, moments, options, subject, calibration, folder)
        metric = lambda name: metric_named(name, seed=options.seed, statistics=statistics)
        scores = {name: all_scores(metric(name), subject.tensors, layout, world) for name in metrics}
        if options.costs:
            orders = {place: scores[choosing[place[0]]][place] for place in _chosen_by_layer(model.config)}
            dtype = PARAM_DTYPES[options.dtype]
            measured_costs(subject, orders, choosing, statistics, calibration, folder, dtype)
        copies = world.size // (layout.tensor * layout.pipeline)
        manifest = ScoresManifest(
            content_id=model.identity,
            model=shape_of(model.config),
            metrics=metrics,
            moments=sorted(moments),
            calibration={"digest": calibration.digest, "sources": calibration.provenance},
            dtype=options.dtype,
            parallel={"tensor": layout.tensor, "pipeline": layout.pipeline, "data": copies},
        )

        def finish() -> None:
            save_scores(folder, scores)
            (folder / FILE).write_text(manifest.dumps(), encoding="utf-8")
            staging.finish_work(folder, save)

        world.on_main(finish)
    if world.is_main:
        log.info("scores of %s on %d samples: %s", ", ".join(metrics), len(calibration.tokens), save)


def choosing_metrics(metrics: list[str]) -> dict[str, str]:
    """Axis → the metric of those that chooses units along it, where they are chosen by layer: as a pruning by these scores.

    Raises:
        InputError: if none of them scores one of these axes.
    """
    chosen = metrics_of(TargetOptions(), has_text=True, held=metrics)
    for axis in layer_axes():
        if chosen[axis] not in metrics:
            able = [name for name in METRICS.names() if axis in METRICS.get(name).axes]
            got, needed = ", ".join(metrics), "one of " + ", ".join(able)
            raise InputError(f"--costs: none of the metrics scores {axis}", got=got, needed=needed)
    return {axis: chosen[axis] for axis in layer_axes()}


def _chosen_by_layer(config: ModelConfig) -> list[tuple[str, int]]:
    return [(axis, layer) for axis in layer_axes() for layer in AXES.get(axis).places(config)]


def metric_names(given: tuple[str, ...]) -> list[str]:
    """Spellings, each once, of metrics that exist; several may stand in one word with commas.

    Raises:
        InputError: naming one that does not, or a parameter that it does not take.
    """
    names = list(dict.fromkeys(metric_named(part).spelling for word in given for part in separate(word)))
    if not names:
        raise InputError("--metrics names none", needed="one or more of " + ", ".join(METRICS.names()))
    return names
