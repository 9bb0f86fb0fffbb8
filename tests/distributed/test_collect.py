"""The pass over the text, at every TP × PP × DP, against stock transformers in float64 with hooks.

Ours runs in float32: sums over some fifty tokens agree to the rounding of a forward pass of four layers, far inside
``TOLERANCE`` of the largest of the values compared. A token too many or too few, or a weight taken twice, moves them by
more than a hundredth.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import rank_jobs_collect as jobs
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny

from megatron_prune.checkpoint import megatron
from megatron_prune.importance.statistics import SITES, LayerStatistics, Statistics
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

TOLERANCE = 3e-5
SAMPLES = {
    "tokens": torch.randint(0, 307, (5, 17), generator=torch.Generator().manual_seed(8)).tolist(),
    "lengths": [17, 9, 17, 2, 13],
    "weights": [1.0, 0.5, 1.25, 2.0, 0.75],
}
MOMENTS = [*SITES, "final_norm", "stream", "rows"]
LAYERS = 4
LAYOUTS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2)]
"""TP, PP, DP."""
MODELS = {
    "gemma3, norms after blocks, a window of 7 in most layers": ("gemma3_text", {}, [(1, 1, 1), (2, 1, 1)]),
    "llama": ("llama", {}, LAYOUTS),
    "mistral, window of 7": ("mistral", {"sliding_window": 7}, [(1, 1, 1), (3, 1, 1)]),
    "qwen2, biases, tied": ("qwen2", {"tie_word_embeddings": True}, [(1, 1, 1), (3, 1, 1), (1, 2, 2)]),
    "qwen2, 2 KV groups on 4 ranks": ("qwen2", {"num_key_value_heads": 2}, [(4, 1, 1)]),
    "qwen3, q and k norms, wide heads": ("qwen3", {"head_dim": 16}, [(1, 1, 1), (3, 1, 1), (2, 2, 1)]),
}
CASES = [
    pytest.param(name, *layout, id="{}, TP {} PP {} DP {}".format(name, *layout))
    for name, (_, _, layouts) in MODELS.items()
    for layout in layouts
]


# --------------------------------------------------------------------------- the reference: dense, float64, Hugging Face


@functools.cache
def dense(source: Path) -> list[dict]:
    """What each sample's real tokens give, {(place, layer): float64 [tokens, features]}."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager").eval()
    seen: dict = {}

    def watch(module, place, layer, *, output=False):
        def keep(module, given, made):
            value = made if output else given[0]
            seen[place, layer] = (value[0] if isinstance(value, tuple) else value)[0].detach()

        module.register_forward_hook(keep)

    after_norms = hasattr(model.model.layers[0], "pre_feedforward_layernorm")
    for number, layer in enumerate(model.model.layers):
        watch(layer.self_attn.q_proj, "input_norm", number)
        watch(layer.self_attn.o_proj, "context", number)
        watch(layer.mlp.gate_proj, "post_norm", number)
        watch(layer.mlp.down_proj, "channels", number)
        watch(layer.input_layernorm, "before", number)
        watch(layer.pre_feedforward_layernorm if after_norms else layer.post_attention_layernorm, "middle", number)
        watch(layer, "after", number, output=True)
    watch(model.model.norm, "before", None)
    watch(model.model.norm, "final_norm", None, output=True)
    runs = []
    for tokens, length in zip(SAMPLES["tokens"], SAMPLES["lengths"]):
        with torch.no_grad():
            model(torch.tensor([tokens[:length]]))
        runs.append(dict(seen))
    return runs


def expected(source: Path, layer: int | None) -> dict[str, torch.Tensor]:
    """The file of a layer, tensor by tensor, from the definitions."""
    runs, weights = dense(source), SAMPLES["weights"]
    total = lambda value: sum(w * value(run) for w, run in zip(weights, runs))
    found = {}
    for site in SITES if layer is not None else ["final_norm"]:
        at = lambda run, site=site: run[site, layer]
        found[f"{site}.tokens"] = total(lambda run: torch.tensor(float(len(at(run))), dtype=torch.float64))
        found[f"{site}.total"] = total(lambda run: at(run).sum(0))
        found[f"{site}.squares"] = total(lambda run: (at(run) ** 2).sum(0))
        found[f"{site}.sample_means"] = total(lambda run: at(run).abs().mean(0) ** 2)
        written = {"context": "middle", "channels": "after"}.get(site)  # evens tokens out
        size = lambda run, written=written: run[written, layer].square().mean(-1, keepdim=True) if written else 1.0
        found[f"{site}.moment"] = total(lambda run: at(run).T @ (at(run) / size(run)))
    epsilon = 1e-6
    unit = lambda x: x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    places = ["before"] if layer is None else ["before", "middle"]
    found["stream"] = total(lambda run: sum(unit(run[place, layer]).T @ unit(run[place, layer]) for place in places))
    lengths = torch.tensor(SAMPLES["lengths"])
    found["rows.weights"] = torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)  # so few that all are sampled
    found["rows.stream"] = torch.cat([run["before", layer] for run in runs])
    if layer is not None:
        channels = torch.cat([run["channels", layer] for run in runs])
        found["rows.kernel"] = channels @ channels.T
    found["last"] = torch.stack([run["before", layer][-1] for run in runs])
    cosine = torch.nn.functional.cosine_similarity
    turned = lambda run: cosine(run["before", layer], run["after", layer], dim=-1).sum()
    tokens = sum(w * length for w, length in zip(weights, SAMPLES["lengths"]))
    found["similarity"] = torch.tensor(1.0) if layer is None else total(turned) / tokens
    return found


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: object) -> None:
    assert ours.shape == theirs.shape, what
    assert (ours.double() - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), what


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """``model(name)`` → (Megatron checkpoint of TP 1, Hugging Face directory), float32."""
    made = {}

    def get(name="llama"):
        if name not in made:
            family, changes, _ = MODELS[name]
            source = tiny(family, dtype="float32", **changes)
            target = tmp_path_factory.mktemp("collect") / "megatron"
            convert(ConvertOptions(load=str(source), save=str(target)), World())
            made[name] = str(target), source
        return made[name]

    return get


@pytest.mark.parametrize("name, tp, pp, dp", CASES)
def test_every_sum_is_the_dense_models_at_every_layout(model, ranks, tmp_path, name, tp, pp, dp):
    checkpoint, source = model(name)
    ranks(tp * pp * dp).run(jobs.collect, checkpoint, str(tmp_path), SAMPLES, tp, pp, MOMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "final.safetensors",
        *(f"layer_{n:04}.safetensors" for n in range(4)),
    ]
    statistics = Statistics(folder=tmp_path, config=megatron.open_checkpoint(Path(checkpoint)).config)
    for layer in (*range(LAYERS), None):
        ours, theirs = load_file(statistics.path(layer)), expected(source, layer)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key], (layer, key))
            assert ours[key].dtype == (torch.float32 if key in ("last", "rows.stream", "rows.kernel") else torch.float64)


def test_the_epsilon_of_the_reference_is_the_models(model):
    assert megatron.open_checkpoint(Path(model()[0])).config.norm_epsilon == 1e-6


def test_moments_are_collected_only_where_they_are_wanted(model, ranks, tmp_path):
    ranks(2).run(jobs.collect, model()[0], str(tmp_path), SAMPLES, 2, 1, ["channels"])
    held = load_file(tmp_path / "layer_0001.safetensors")
    assert [key for key in held if key.endswith("moment")] == ["channels.moment"] and "stream" not in held


@pytest.mark.parametrize("tp, dp", [(1, 1), (2, 1), (1, 2)])
def test_how_many_samples_go_together_changes_nothing(model, ranks, tmp_path, tp, dp):
    for name, tokens in (("one", 1), ("three", 51), ("all", 4096)):
        ranks(tp * dp).run(jobs.collect, model()[0], str(tmp_path / name), SAMPLES, tp, 1, MOMENTS, batch_tokens=tokens)
    for file in (tmp_path / "all").iterdir():
        whole = load_file(file)
        for name in ("one", "three"):
            for key, value in load_file(tmp_path / name / file.name).items():
                assert_close(value, whole[key].double(), (file.name, key))


def test_more_copies_than_samples(model, ranks, tmp_path):
    few = {key: value[:2] for key, value in SAMPLES.items()}
    ranks(1).run(jobs.collect, model()[0], str(tmp_path / "one"), few, 1, 1, MOMENTS)
    ranks(3).run(jobs.collect, model()[0], str(tmp_path / "three"), few, 1, 1, MOMENTS)
    for file in (tmp_path / "one").iterdir():
        for key, value in load_file(file).items():
            assert_close(load_file(tmp_path / "three" / file.name)[key], value.double(), (file.name, key))


# ---------------------------------------------------------------------------------------------------------- going on


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size, tp, pp", [(1, 1, 1), (3, 3, 1), (2, 1, 2)])
def test_a_pass_that_was_stopped_goes_on_from_the_layers_that_are_there(model, ranks, tmp_path, size, tp, pp):
    run = lambda folder, **more: ranks(size).run(jobs.collect, model()[0], str(folder), SAMPLES, tp, pp, MOMENTS, **more)
    each = [count // LAYERS for count in run(tmp_path / "whole")]
    whole = contents(tmp_path / "whole")
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        run(tmp_path / "part", stop_after=[2 * count + 1 for count in each])
    assert sorted(contents(tmp_path / "part")) == ["layer_0000.safetensors", "layer_0001.safetensors"]
    written = (tmp_path / "part/layer_0001.safetensors").stat().st_mtime_ns
    run(tmp_path / "part")
    assert contents(tmp_path / "part") == whole
    assert (tmp_path / "part/layer_0001.safetensors").stat().st_mtime_ns == written
    for gone in (["layer_0002"], ["layer_0000", "final"], ["final"]):
        for name in gone:
            (tmp_path / f"part/{name}.safetensors").unlink()
        run(tmp_path / "part")
        assert contents(tmp_path / "part") == whole
    assert run(tmp_path / "part") == [0] * size  # all there: nothing is run


def test_a_file_half_written_is_not_taken_for_a_finished_layer(model, ranks, tmp_path, monkeypatch):
    ranks(1).run(jobs.collect, model()[0], str(tmp_path), SAMPLES, 1, 1, [])
    whole = contents(tmp_path)
    half = (tmp_path / "layer_0003.safetensors").read_bytes()[:100]
    (tmp_path / "layer_0003.safetensors").unlink()
    (tmp_path / "layer_0003.new").write_bytes(half)
    ranks(1).run(jobs.collect, model()[0], str(tmp_path), SAMPLES, 1, 1, [])
    assert contents(tmp_path) == whole


# --------------------------------------------------------------------------------------------------------- bad weights

BROKEN = {
    "model.layers.2.mlp.up_proj.weight": "the output of layer 2 is not finite",
    "model.layers.0.self_attn.q_proj.weight": "the output of layer 0 is not finite",
    "model.norm.weight": "the output of the final norm is not finite",
    "model.embed_tokens.weight": "the output of the embedding is not finite",
}


@pytest.mark.parametrize("tensor", BROKEN)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_name_the_layer_on_every_rank(ranks, tmp_path, tensor, value):
    hf = build_tiny(tmp_path / "hf", "qwen2", dtype="float32")
    weights = load_file(hf / "model.safetensors")
    weights[tensor].view(-1)[:48] = value  # a row; of the embedding that of token 0
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    convert(ConvertOptions(load=str(hf), save=str(tmp_path / "m")), World())
    samples = {**SAMPLES, "tokens": [[0, *tokens[1:]] for tokens in SAMPLES["tokens"]]}
    arguments = (str(tmp_path / "m"), str(tmp_path / "sums"), samples)
    for size, tp, pp in ((1, 1, 1), (3, 3, 1), (2, 1, 2)):
        messages = ranks(size).run(jobs.collect_refused, *arguments, tp, pp, MOMENTS)
        assert all(BROKEN[tensor] in message for message in messages), messages
    last = {"2": 2, "0": 0}.get(tensor.split(".")[2] if "layers" in tensor else "", LAYERS if "norm" in tensor else 0)
    assert len(list((tmp_path / "sums").glob("layer_*"))) == last and not (tmp_path / "sums/final.safetensors").exists()


def test_statistics_come_back_from_their_file(tmp_path):
    generator = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.rand(shape, dtype=torch.float64, generator=generator)
    from megatron_prune.importance.statistics import SiteStatistics

    site = SiteStatistics(tokens=3.5, total=rand(4), squares=rand(4), sample_means=rand(4), moment=rand(4, 4))
    one = LayerStatistics(sites={"context": site}, similarity=0.25, last=rand(2, 3).float(), stream=rand(3, 3))
    one.save(tmp_path / "a.safetensors")
    back, light = (
        LayerStatistics.load(tmp_path / "a.safetensors"),
        LayerStatistics.load(tmp_path / "a.safetensors", moments=False),
    )
    assert back.similarity == 0.25 and back.sites["context"].tokens == 3.5
    for part in ("total", "squares", "sample_means", "moment"):
        assert torch.equal(getattr(back.sites["context"], part), getattr(site, part))
    assert torch.equal(back.stream, one.stream) and torch.equal(back.last, one.last)
    assert light.stream is None and light.sites["context"].moment is None and torch.equal(light.last, one.last)
