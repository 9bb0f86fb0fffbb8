"""Every metric of activations against its docstring's formula, computed token by token and unit by unit."""

from __future__ import annotations

import math

import pytest
import torch
from dense import SMALL, random_model, raw_map
from measured import activations, measured

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import InputError
from megatron_prune.importance.metric import METRICS
from megatron_prune.importance.metrics.fold import RIDGE
from megatron_prune.importance.metrics.obs import DAMPING
from megatron_prune.importance.scoring import all_scores, score
from megatron_prune.importance.statistics import ROWS, SITES
from megatron_prune.planning.selection import keep_layers
from megatron_prune.runtime.world import World

LAYERS, HEADS, GROUPS, DIM = 4, 12, 6, 2
MODEL = random_model(SMALL, seed=3)
SEEN = activations(SMALL)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """``found(metric)`` → its scores of every axis."""
    home = tmp_path_factory.mktemp("metrics")
    tensors, statistics = raw_map(home / "bytes", SMALL, MODEL), measured(home / "sums", SMALL, SEEN)
    return lambda name: all_scores(METRICS.get(name)(statistics=statistics), tensors, ParallelLayout(), World())


def assert_scores(ours: torch.Tensor, theirs, tolerance: float = 1e-10) -> None:
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    assert ours.shape == theirs.shape and ours.dtype == torch.float64
    assert ((ours - theirs).abs() <= tolerance * theirs.abs()).all()


def weight(role: str, layer: int | None = None) -> torch.Tensor:
    return next(value.double() for tensor, value in MODEL.items() if tensor == (role, layer))


def columns(axis: str, unit: int) -> range:
    """Features at the input of ``o`` or ``down`` that a unit owns."""
    each = {"ffn": 1, "head": DIM, "kv_head": HEADS // GROUPS * DIM}[axis]
    return range(unit * each, (unit + 1) * each)


PLACES = [("ffn", "channels", "down", 24), ("head", "context", "o", HEADS), ("kv_head", "context", "o", GROUPS)]


# ------------------------------------------------------------------------------------------------------- of activations


@pytest.mark.parametrize(
    "name, norm",
    [
        ("activation", lambda x: math.sqrt(sum(float(value) ** 2 for value in x.flatten()))),
        ("minitron", lambda x: math.sqrt(sum((float(sample.abs().sum()) / len(sample)) ** 2 for sample in x))),
    ],
)
def test_activation_and_minitron_are_the_norms_of_what_units_give(found, name, norm):
    """``norm``: of one feature, [samples, tokens]."""
    scores = found(name)
    norms = {place: torch.tensor([norm(x[..., i]) for i in range(x.shape[-1])], dtype=torch.float64) for place, x in SEEN.items()}
    for layer in range(LAYERS):
        for axis, site, _, count in PLACES:
            of = norms[site, layer]
            assert_scores(scores[axis, layer], [of[list(columns(axis, unit))].norm() for unit in range(count)])
    sites = [("final_norm", None), *((site, layer) for layer in range(LAYERS) for site in ("input_norm", "post_norm"))]
    assert_scores(scores["hidden", None], sum(norms[site] for site in sites))
    whole = [torch.cat([norms[site, layer] for site in ("context", "channels")]).norm() for layer in range(LAYERS)]
    assert_scores(scores["layer", None], whole)


def test_wanda_is_every_weight_times_the_norm_of_what_it_reads(found):
    scores = found("wanda")
    norms = {place: x.flatten(0, 1).norm(dim=0) for place, x in SEEN.items()}
    reads = {"input_norm": ["q", "k", "v"], "context": ["o"], "post_norm": ["gate", "up"], "channels": ["down"]}
    hidden, whole = weight("output").abs().sum(0) * norms["final_norm", None], []
    for layer in range(LAYERS):
        size = {role: weight(role, layer).abs() * norms[site, layer] for site, roles in reads.items() for role in roles}
        whole.append(sum(value.sum() for value in size.values()))
        hidden = (
            hidden + sum(size[role].sum(0) for role in ("q", "k", "v", "gate", "up")) + size["o"].sum(1) + size["down"].sum(1)
        )
        assert_scores(scores["ffn", layer], size["gate"].sum(1) + size["up"].sum(1) + size["down"].sum(0))
        head = size["q"].sum(1).view(HEADS, DIM).sum(1) + size["o"].sum(0).view(HEADS, DIM).sum(1)
        assert_scores(scores["head", layer], head)
        pair = (size["k"] + size["v"]).sum(1).view(GROUPS, DIM).sum(1)
        assert_scores(scores["kv_head", layer], pair + head.view(GROUPS, -1).sum(1))
    assert_scores(scores["hidden", None], hidden)
    assert_scores(scores["layer", None], torch.stack(whole))


def test_fluctuation_is_the_variance_of_a_feature_times_the_norm_of_its_column(found):
    scores = found("fluctuation")
    for layer in range(LAYERS):
        for axis, site, role, count in PLACES:
            x, w = SEEN[site, layer].flatten(0, 1), weight(role, layer)
            each = [sum(x[:, j].var(correction=0) * w[:, j].square().sum() for j in columns(axis, u)) for u in range(count)]
            assert_scores(scores[axis, layer], torch.stack(each), 1e-8)


def test_obs_is_the_error_that_is_left_after_fitting_the_others_again(found):
    """Brute force: least squares on what stays, with the damping as further rows of data."""
    scores = found("obs")
    for layer in range(LAYERS):
        for axis, site, role, count in PLACES:
            x, w = SEEN[site, layer].flatten(0, 1), weight(role, layer)
            damping = DAMPING * x.square().sum(0).mean()
            x = torch.cat([x, damping.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
            errors = []
            for unit in range(count):
                others = [j for j in range(x.shape[1]) if j not in columns(axis, unit)]
                fitted = torch.linalg.lstsq(x[:, others], x @ w.T).solution
                errors.append((x @ w.T - x[:, others] @ fitted).square().sum())
            assert_scores(scores[axis, layer], torch.stack(errors), 1e-7)


def test_obs_stands_features_that_are_never_seen(tmp_path):
    """Dead channels: the moment is singular without damping, and they cost nothing."""
    seen = {place: x.clone() for place, x in SEEN.items()}
    seen["channels", 0][..., [3, 9]] = 0.0
    seen["channels", 1][:] = 0.0
    statistics = measured(tmp_path / "sums", SMALL, seen)
    metric = METRICS.get("obs")(statistics=statistics)
    ours = score(metric, raw_map(tmp_path / "bytes", SMALL, MODEL), ParallelLayout(), [("ffn", 0), ("ffn", 1)], World())
    assert ours["ffn", 0].isfinite().all() and ours["ffn", 1].isfinite().all()
    assert set(ours["ffn", 0].argsort()[:2].tolist()) == {3, 9}


# ------------------------------------------------------------------------------------------------------------- of depth


def test_block_influence_is_what_the_cosine_lacks(found, tmp_path):
    statistics = measured(tmp_path, SMALL, SEEN)
    ours = found("block_influence")
    assert list(ours) == [("layer", None)]
    assert_scores(ours["layer", None], [1 - statistics.layer(layer).similarity for layer in range(LAYERS)])


def test_angular_is_the_angle_between_the_ends_of_every_block(found):
    ours = found("angular")
    ends = [SEEN["before", layer][:, -1].float().double() for layer in (*range(LAYERS), None)]
    for count in range(1, LAYERS):
        angles = []
        for first in range(LAYERS - count + 1):
            each = [
                math.acos(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))) / math.pi
                for a, b in zip(ends[first], ends[first + count])
            ]
            angles.append(sum(each) / len(each))
        assert_scores(ours["block", count], angles)
    assert_scores(ours["layer", None], ours["block", 1])
    start = int(ours["block", 2].argmin())
    assert keep_layers(ours, LAYERS, 2) == [layer for layer in range(LAYERS) if layer not in (start, start + 1)]


def test_fold_is_the_error_at_a_token_that_was_left_out_of_the_fit(found):
    """Brute force: ridge regression on all other tokens, one token after the other."""
    ours, width = found("fold"), SMALL.ffn_hidden_size
    stream = [SEEN["before", layer].flatten(0, 1).float().double() for layer in (*range(LAYERS), None)]
    counted = 1.0 + torch.arange(len(stream[0])).double() % 2
    for count in range(1, LAYERS):
        left = []
        for first in range(LAYERS - count + 1):
            added, size = stream[first + count] - stream[first], stream[first + count].square().sum(1)
            if first > 0:
                x = SEEN["channels", first - 1].flatten(0, 1)
                w = counted / stream[first].square().mean(1)
                damping = RIDGE * (w[:, None] * x.square()).sum() / width * torch.eye(width, dtype=torch.float64)
                errors = []
                for token in range(len(x)):
                    others = torch.arange(len(x)) != token
                    xs, ws = x[others], w[others, None]
                    fitted = torch.linalg.solve(xs.T @ (ws * xs) + damping, xs.T @ (ws * added[others]))
                    errors.append(added[token] - x[token] @ fitted)
                added = torch.stack(errors)
            left.append((counted * added.square().sum(1) / size).sum() / counted.sum())
        assert_scores(ours["block", count], left, 1e-4)
    assert_scores(ours["layer", None], ours["block", 1])


def test_perplexity_is_the_loss_that_a_layer_saves(found, tmp_path):
    losses = measured(tmp_path, SMALL, SEEN).losses()
    assert_scores(found("perplexity")["layer", None], [losses[layer] - losses[LAYERS] for layer in range(LAYERS)], 1e-12)


# ------------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", METRICS.names())
def test_a_metric_says_what_it_needs(found, name):
    kind = METRICS.get(name)
    assert kind.needs <= {"activations", "gradients", "losses"} and kind.axes
    assert not kind.moments or "activations" in kind.needs
    assert kind.moments.keys() <= kind.axes and set(kind.moments.values()) <= {*SITES, ROWS}
    assert all(value.dtype == torch.float64 for value in found(name).values())


def test_an_unknown_metric_is_refused_naming_those_there_are():
    with pytest.raises(InputError, match="activation.*obs.*wanda"):
        METRICS.get("beauty")
