"""Re-fitting against what it should be: closed forms on float64 activations of transformers, and cuts that lose nothing."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from per_layer import like_tiny
from safetensors.torch import load_file, save_file
from tiny import build_tiny, logits, state_dict

from megatron_prune.arch.blocks.block import spaces
from megatron_prune.arch.tensors import TensorId, full_shape, layer_roles, tensor_ids
from megatron_prune.checkpoint import huggingface
from megatron_prune.checkpoint.role_store import RoleStore
from megatron_prune.errors import InputError
from megatron_prune.pruning import fit
from megatron_prune.runtime.world import World
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf
from megatron_prune.surgery.kept import AFTER, windows_of
from megatron_prune.surgery.reconstruct import RATE
from megatron_prune.surgery.refit import Refit
from megatron_prune.text.artifact import save_samples

RIDGE = 0.05
SAMPLES = torch.randint(307, (12, 40), generator=torch.Generator().manual_seed(3))


def run(model: Path, save: Path, sizes: dict | None, **options) -> Path:
    """Prune a Hugging Face directory on :data:`SAMPLES`."""
    samples = save.with_name("samples.safetensors")
    save_samples(samples, SAMPLES, {"content_id": "for a test"})
    config = save.with_name("sizes.json")
    if sizes:
        config.write_text(json.dumps(sizes))
        options["prune_config_path"] = str(config)
    defaults = {
        "data": (str(samples),),
        "nsamples": 12,
        "seq_length": 40,
        "ridge": RIDGE,
        "metric": "activation",
        "reconstruct": 0,
    }
    given = {**defaults, **options}
    if given.get("refit") is False:
        given |= {"ridge": None, "reconstruct": 4}  # as they are by default
    prune_hf(PruneHfOptions(load=str(model), save=str(save), **given), World())
    return save


def activations(model: Path, layers: int) -> dict:
    """Float64 inputs of o and down, and the stream before, in the middle of and after every layer, tokens flattened."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    seen: dict = {}

    def keep(name, output=False):
        def hook(module, given, made):
            value = made if output else given[0]
            seen[name] = (value[0] if isinstance(value, tuple) else value).detach().flatten(0, 1)

        return hook

    for number, layer in enumerate(whole.model.layers[:layers]):
        layer.self_attn.o_proj.register_forward_hook(keep(("o", number)))
        layer.mlp.down_proj.register_forward_hook(keep(("down", number)))
        layer.register_forward_hook(keep(("before", number)))
        layer.post_attention_layernorm.register_forward_hook(keep(("middle", number)))
        layer.register_forward_hook(keep(("after", number), output=True))
    with torch.no_grad():
        whole(SAMPLES)
    return seen


def closed_form(inputs: torch.Tensor, wanted: torch.Tensor, stream: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Ridge regression towards ``start``, every token divided by its size, as plain least squares on stacked rows."""
    even = stream.square().mean(dim=1, keepdim=True).rsqrt()
    x, t = inputs * even, wanted * even
    root = (RIDGE * x.square().sum(dim=0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([t, root * start.T])).solution.T


def kept_channels(model: dict, pruned: dict, layer: int) -> list[int]:
    """Which channels stayed, found by the rows of gate."""
    name = f"model.layers.{layer}.mlp.gate_proj.weight"
    return [int((model[name] == row).all(dim=1).nonzero()[0]) for row in pruned[name]]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_down_is_the_closed_form(tmp_path, family):
    model = build_tiny(tmp_path / "model", family, dtype="float32")
    out = run(model, tmp_path / "out", {"ffn_hidden_size_remain": 64})
    before, after, seen = state_dict(model), state_dict(out), activations(model, 4)
    for layer in range(4):
        kept = kept_channels(before, after, layer)
        down = before[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        wanted = seen["after", layer] - seen["middle", layer]
        expected = closed_form(seen["down", layer][:, kept], wanted, seen["after", layer], down[:, kept])
        found = after[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_a_cut_block_is_folded_into_the_matrix_before_it(tmp_path):
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    out = run(model, tmp_path / "out", {"drop_layers": [2]})
    before, after, seen = state_dict(model), state_dict(out), activations(model, 4)
    down = before["model.layers.1.mlp.down_proj.weight"].double()
    wanted = seen["before", 3] - seen["middle", 1]
    expected = closed_form(seen["down", 1], wanted, seen["before", 3], down)
    found = after["model.layers.1.mlp.down_proj.weight"].double()
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        assert torch.equal(after[f"model.layers.2.{name}.weight"], before[f"model.layers.3.{name}.weight"])


def test_layers_after_a_cut_block_learn_with_the_one_before_it(tmp_path):
    """Adam's steps on the layers 1, 3, 4, 5 and 6, begun where least squares ended, by transformers in float64."""
    model = build_tiny(tmp_path / "model", "llama", dtype="float32", num_hidden_layers=8)
    folded, out = (run(model, tmp_path / name, {"drop_layers": [2]}, reconstruct=passes) for name, passes in (("f", 0), ("o", 1)))
    before, start, after, seen = state_dict(model), state_dict(folded), state_dict(out), activations(model, 8)
    for new, old in ((0, 0), (6, 7)):
        for name in (name for name in after if name.startswith(f"model.layers.{new}.")):
            assert torch.equal(after[name], before[name.replace(f"layers.{new}", f"layers.{old}")])

    from transformers import AutoModelForCausalLM

    pruned = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float64)
    layers = pruned.model.layers
    streams = {}
    for number in (1, 6):
        layers[number].register_forward_pre_hook(lambda _, given, number=number: streams.update({number: given[0]}))
    by_sample = lambda flat: flat.view(*SAMPLES.shape, -1)
    layers[1].register_forward_pre_hook(lambda _, given: (by_sample(seen["before", 1])[chosen], *given[1:]))
    wanted = by_sample(seen["before", 7])
    even = wanted.square().mean(dim=-1)
    held, others = [7], [n for n in range(len(SAMPLES)) if n != 7]

    def error(of: list[int]) -> torch.Tensor:
        nonlocal chosen
        chosen = of
        pruned(SAMPLES[of])
        return ((streams[6] - wanted[of]).square().sum(dim=-1) / even[of]).sum()

    chosen = held
    matrices = {name: value for name, value in pruned.named_parameters() if name.endswith("_proj.weight")}
    matrices = {name: value for name, value in matrices.items() if name.split(".")[2] in "12345"}
    fused = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate up", "up": "gate up"}
    groups: dict = {}
    for name, value in matrices.items():
        role = name.split(".")[-2].removesuffix("_proj")
        groups.setdefault((name.split(".")[2], fused.get(role, role)), []).append(value)
    size = lambda values: torch.cat([value.detach().flatten() for value in values]).square().mean().sqrt().item()
    adam = torch.optim.Adam([{"params": g, "lr": RATE * size(g)} for g in groups.values()], betas=(0.9, 0.99))
    first = error(held).item()
    for step in range(2):
        adam.zero_grad()
        (error(others) / first).backward()
        adam.step()
        for group in adam.param_groups:
            group["lr"] /= 2
    assert error(held).item() < first
    for name, value in matrices.items():
        moved = (value.detach() - start[name]).abs().mean()
        assert (value.detach() - after[name]).abs().mean() <= 0.01 * moved, name


def test_sequential_layers_see_what_the_pruned_ones_left(tmp_path):
    """The o of layer 1 is fitted from its context in the pruned model to where the dense stream goes."""
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    out = run(model, tmp_path / "out", {"ffn_hidden_size_remain": 64}, sequential=True)
    before, seen, pruned = state_dict(model), activations(model, 4), activations(out, 4)
    wanted = seen["middle", 1] - pruned["before", 1]
    o = before["model.layers.1.self_attn.o_proj.weight"].double()
    expected = closed_form(pruned["o", 1], wanted, seen["middle", 1], o)
    found = state_dict(out)["model.layers.1.self_attn.o_proj.weight"].double()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def confine(model: Path, width: int, *, even_norms: bool) -> None:
    """Make a model whose residual stream lies in ``width`` directions, so that cutting to them loses nothing."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    hidden = whole.config.hidden_size
    q = torch.linalg.qr(torch.randn(hidden, width, generator=torch.Generator().manual_seed(5)))[0]
    inside = q @ q.T
    with torch.no_grad():
        whole.model.embed_tokens.weight.copy_(whole.model.embed_tokens.weight @ inside)
        for layer in whole.model.layers:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.copy_(inside @ matrix.weight)
        if even_norms:
            whole.model.norm.weight.fill_(1.3)
    whole.save_pretrained(model)


@pytest.mark.parametrize("tied", [False, True])
def test_rotating_a_stream_that_fits_loses_nothing(tmp_path, tied, monkeypatch):
    monkeypatch.setattr("megatron_prune.surgery.basis.MASSIVE_CHANNELS", 0)
    model = build_tiny(tmp_path / "model", "mistral", dtype="float32", tie_word_embeddings=tied)
    confine(model, 36, even_norms=tied)
    out = run(model, tmp_path / "out", {"hidden_size_remain": 36}, reader_ridge=1e-6, ridge=1e-6)
    tokens = SAMPLES[:2]
    dense, pruned = logits(model, tokens), logits(out, tokens)
    assert (dense - pruned).abs().max() <= 2e-3 * dense.abs().max()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied


def test_re_fitting_brings_the_model_nearer(tmp_path):
    """Against the bare cut of the same plan, on the text it was fitted to."""
    model = build_tiny(tmp_path / "model", "qwen2", dtype="float32")
    sizes = {"ffn_hidden_size_remain": 56, "num_query_groups_remain": 4}
    fitted = run(model, tmp_path / "fitted", sizes, save_plan=str(tmp_path / "plan.json"), ridge=None)
    bare = run(model, tmp_path / "bare", sizes, refit=False)
    dense = logits(model, SAMPLES)
    error = lambda folder: (logits(folder, SAMPLES) - dense).square().mean().item()
    assert error(fitted) < 0.8 * error(bare)


def test_a_search_keeps_the_shape_of_the_lowest_loss(tmp_path, monkeypatch):
    """The losses it compares are those of stock transformers on the same text."""
    losses: list[float] = []
    plain = Refit.loss
    monkeypatch.setattr(Refit, "loss", lambda self, **k: losses.append(plain(self, **k)) or losses[-1])
    model = build_tiny(tmp_path / "model", "mistral", dtype="float32")
    out = run(model, tmp_path / "out", None, ratio=0.25, search=3, hidden_method="select", ridge=None, sequential=False)
    assert len(losses) == 3 and len(set(losses)) == 3
    found = logits(out, SAMPLES[7:8])[0, :-1]  # the sample that joint fits hold out
    loss = torch.nn.functional.cross_entropy(found, SAMPLES[7, 1:]).item()
    assert loss == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("rate", [RATE, 30.0])
@pytest.mark.parametrize("sizes", [{"drop_layers": [1]}, {"ffn_hidden_size_remain": 56, "num_query_groups_remain": 4}])
def test_progress_comes_to_the_work_announced(tmp_path, sizes, rate, monkeypatch):
    """Also where steps are so long that no pass helps, and all are taken back."""
    seen = []

    @contextlib.contextmanager
    def bar(label, total, **_):
        found = []
        yield found.append
        if label == "re-fitting":
            seen.append((total, sum(found), min(found)))

    monkeypatch.setattr("megatron_prune.pruning.fit.progress_bar", bar)
    monkeypatch.setattr("megatron_prune.surgery.reconstruct.RATE", rate)
    monkeypatch.setattr("megatron_prune.surgery.reconstruct.SLOWEST", 1)
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    run(model, tmp_path / "out", sizes, reconstruct=2)
    ((total, reported, least),) = seen
    assert reported == total > 4 * SAMPLES.numel()
    assert least < 0 or rate == RATE


@pytest.mark.parametrize("sizes", [{"ffn_hidden_size_remain": 8}, {"num_query_groups_remain": 2}])
def test_where_much_is_lost_both_ways_are_tried_and_the_better_one_stays(tmp_path, monkeypatch, sizes):
    """What they lose is what stock transformers lose on the sample that joint fits hold out."""
    monkeypatch.setattr("megatron_prune.pruning.fit.SEVERE", -math.inf)
    seen: list[float] = []
    plain = fit.refitted
    monkeypatch.setattr("megatron_prune.pruning.fit.refitted", lambda *a, **k: seen.append(plain(*a, **k)) or seen[-1])
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    out = run(model, tmp_path / "out", sizes, ridge=None)
    ways = [run(model, tmp_path / str(way), sizes, ridge=None, sequential=way) for way in (False, True)]
    held = SAMPLES[7:8]
    loss = lambda folder: torch.nn.functional.cross_entropy(logits(folder, held)[0, :-1], held[0, 1:]).item()
    lost = [loss(way) - loss(model) for way in ways]
    assert [one.lost for one in seen] == pytest.approx([*lost, *lost], abs=1e-4)
    ours, theirs = state_dict(out), state_dict(ways[lost.index(min(lost))])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["made_by"]["refit"]["sequential"] is (lost.index(min(lost)) == 1)


def test_a_budget_leaves_out_shapes_whose_rotation_a_tied_head_forbids(tmp_path, monkeypatch):
    """Not found out after other shapes were fitted, and no reason to end."""
    monkeypatch.setattr("megatron_prune.pruning.stream.LARGEST_SPREAD", 0.0)
    model = build_tiny(tmp_path / "model", "mistral", dtype="float32", tie_word_embeddings=True)
    out = run(model, tmp_path / "out", None, ratio=0.3, search=40)
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 48
    with pytest.raises(InputError, match="varies too much(.|\n)*--untie(.|\n)*select"):
        run(model, tmp_path / "exact", None, hidden_size_remain=36, hidden_method="rotate")


def test_channels_are_selected_where_a_tied_head_forbids_a_rotation_that_nobody_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prune.pruning.stream.LARGEST_SPREAD", 0.0)
    model = build_tiny(tmp_path / "model", "mistral", dtype="float32", tie_word_embeddings=True)
    found = run(model, tmp_path / "out", None, hidden_size_remain=36)
    asked = run(model, tmp_path / "asked", None, hidden_size_remain=36, hidden_method="select")
    ours, theirs = state_dict(found), state_dict(asked)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    plan, other = (json.loads((folder / "plan.json").read_text()) for folder in (found, asked))
    assert plan["hidden"] == other["hidden"] and len(plan["hidden"]) == 36
    assert "the final norm varies too much" in plan["made_by"]["hidden_method"] and "hidden_method" not in other["made_by"]


@pytest.mark.parametrize(
    "option, value", [("reconstruct", -1), ("ridge", -0.5), ("ridge", float("inf")), ("reader_ridge", float("nan"))]
)
def test_negative_strengths_and_passes_are_refused_before_work(tmp_path, option, value):
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    with pytest.raises(InputError, match=rf"--{option.replace('_', '-')}\s+got: {value}\s+needed: at least 0"):
        run(model, tmp_path / "out", {"ffn_hidden_size_remain": 64}, **{option: value})
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@given(kept=st.sets(st.integers(0, 19), min_size=1).map(sorted), layers=st.integers(20, 22))
def test_windows_hold_every_layer_once_and_begin_before_a_cut_block(kept, layers):
    windows = windows_of(kept, layers)
    assert [number for window in windows for number in window] == list(range(len(kept)))
    followed = [end > layer + 1 for layer, end in zip(kept, [*kept[1:], layers])]
    for window in windows:
        assert len(window) == 1 or followed[window[0]]
        assert len(window) == 1 + AFTER or not followed[window[0]] or window.stop == len(kept)


# ------------------------------------------------------------------------------------------------- norms after the blocks


def test_a_writer_before_a_norm_takes_over_what_copies_of_its_channels_wrote(tmp_path):
    """Channels 60 to 95 are smaller copies of the first 36: they go, and those can say what they wrote."""
    model = build_tiny(tmp_path / "model", "gemma3_text", dtype="float32")
    weights = state_dict(model)
    for layer in range(4):
        gate, up, down = (weights[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        gate[60:], up[60:] = gate[:36], 0.3 * up[:36]
        down[:, 60:] *= 0.3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    sizes = {"ffn_hidden_size_remain": 60}
    bare = tmp_path / "bare"
    prune_hf(PruneHfOptions(load=str(model), save=str(bare), metric="magnitude", **sizes), World())
    fitted = run(model, tmp_path / "fitted", sizes, metric="magnitude", ridge=1e-8)
    dense = logits(model, SAMPLES)
    plan = json.loads((fitted / "plan.json").read_text())
    assert plan["layers"][0]["ffn"] == list(range(60))
    error = lambda folder: ((logits(folder, SAMPLES) - dense).abs().max() / dense.abs().max()).item()
    assert error(fitted) < 1e-3 < 0.03 < error(bare)


@pytest.mark.parametrize("tied", [True, False])
def test_selected_channels_are_the_dense_model_without_the_others(tmp_path, tied):
    """In float64: what is dropped is zero everywhere, and a norm's mean runs over what stays; √hidden counts as it did."""
    model = build_tiny(tmp_path / "model", "gemma3_text", dtype="float32", tie_word_embeddings=tied)
    out = run(model, tmp_path / "out", {"hidden_size_remain": 36}, refit=False)
    kept = json.loads((out / "plan.json").read_text())["hidden"]
    opened = huggingface.open_model(model)
    whole = lambda tensor: opened.tensors.read_block(tensor, range(opened.tensors.shape(tensor)[0])).double()
    weights = {tensor: whole(tensor) for tensor in tensor_ids(opened.config)}
    gone = [channel for channel in range(48) if channel not in kept]
    for tensor, data in weights.items():
        for dim, space in enumerate(spaces(tensor.role)):
            if space == "hidden" and data.dim() == 1:
                data.copy_((1 + data) * (36 / 48) ** 0.5 - 1)
                data[gone] = -1.0
            elif space == "hidden":
                data.index_fill_(dim, torch.tensor(gone), 0.0)
    expected = oracle.logits(opened.config, weights, SAMPLES[:2])
    assert (logits(out, SAMPLES[:2]) - expected).abs().max() < 1e-4 * expected.std()


def test_a_rotation_that_is_asked_for_by_name_is_refused_where_norms_follow_blocks(tmp_path):
    model = build_tiny(tmp_path / "model", "gemma3_text", dtype="float32")
    with pytest.raises(InputError, match="(?s)--hidden-method rotate.*norm after its blocks.*select"):
        run(model, tmp_path / "out", {"hidden_size_remain": 36}, hidden_method="rotate")
    out = run(model, tmp_path / "out", {"hidden_size_remain": 36})
    assert "norm after its blocks" in json.loads((out / "plan.json").read_text())["made_by"]["hidden_method"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_token_whose_embedding_is_all_zeros_spoils_no_fit(tmp_path, family):
    """As that of a padding token is, which may begin a text: nothing is in the stream there, in some families to the last layer."""
    model = build_tiny(tmp_path / "model", family, dtype="float32")
    weights = load_file(model / "model.safetensors")
    first = {int(SAMPLES[0, 0]), json.loads((model / "config.json").read_text())["bos_token_id"]}
    weights["model.embed_tokens.weight"][list(first)] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    lost = {}
    for name, sizes in {
        "ffn": {"ffn_hidden_size_remain": 64},
        "hidden": {"hidden_size_remain": 36},
        "fold": {"drop_layers": [2]},
    }.items():
        out = run(model, tmp_path / name, sizes, reconstruct=1)
        losses = json.loads((out / "megatron_prune_recipe.json").read_text())["recipe"][-1]["held_out_loss"]
        lost[name] = losses["after"] - losses["before"]
        assert logits(out, SAMPLES[:1]).isfinite().all()
    assert all(abs(nats) < 1 for nats in lost.values()), lost
    ratio = run(model, tmp_path / "ratio", None, ratio=0.2, metric=None)
    assert logits(ratio, SAMPLES[:1]).isfinite().all()


def test_numbers_that_are_none_are_not_kept_for_the_next_run(tmp_path):
    config = like_tiny("llama")
    weights = {role: torch.zeros(full_shape(TensorId(role, 0), config)) for role in layer_roles(config.of_layer(0))}
    weights["down"][3, 4] = float("nan")
    with pytest.raises(InputError, match=r"(?s)fitted of layer 0 is not finite.*down"):
        RoleStore(tmp_path, config).save(0, weights)
    assert not list(tmp_path.iterdir())
