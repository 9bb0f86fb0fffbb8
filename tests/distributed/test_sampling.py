"""Text sampled with cached keys and values is what the model itself says, the same at every TP × PP × DP and batch size.

Cached logits are compared in float32 with stock transformers' full forward pass, with the tolerance of ``test_logits.py``.
Two samplings of equal logits (up to rounding, 1e-6) differ where a drawn number falls within the rounding of a boundary of
the distribution: for the few hundred draws here less than once in a thousand seeds, so texts are compared for equality.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path

import numpy
import oracle
import per_layer
import pytest
import rank_jobs_sampling as jobs
import tiny as tiny_module
import torch
from ranks import RankFailed

from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES
from megatron_prune.runtime.sampling import Draws, choose
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.text.hf_samples import sample_hf

TOLERANCE = 1e-4
TOKENS = torch.randint(0, 307, (3, 40), generator=torch.Generator().manual_seed(7))
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "window": ("mistral", {"sliding_window": 11}),
    "window of one": ("mistral", {"sliding_window": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "one KV group": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma3": ("gemma3_text", {}),
    "layers that differ": ("gemma3_text", {}),
}
LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]
ONE_BY_ONE = [2] + [1] * 38
CACHED = [
    *[("llama", tp, pp, ONE_BY_ONE) for tp, pp in LAYOUTS],
    *[(name, 1, 1, ONE_BY_ONE) for name in ("window of one", "one KV group")],
    *[(name, tp, pp, ONE_BY_ONE) for name in ("window", "qwen2", "qwen3") for tp, pp in [(1, 1), (3, 1), (2, 2)]],
    ("one KV group", 4, 1, ONE_BY_ONE),
    ("gemma3", 2, 2, ONE_BY_ONE),
    ("layers that differ", 1, 1, [7, 3, 1, 16, 1, 12]),
    ("layers that differ", 2, 2, ONE_BY_ONE),
    ("gemma3", 1, 1, [7, 3, 1, 16, 1, 12]),
    *[(name, 1, 1, pieces) for name in ("llama", "window") for pieces in ([1] * 40, [7, 3, 1, 16, 1, 12], [20, 20])],
    ("window", 1, 2, [7, 3, 1, 16, 1, 12]),
]
OPTIONS = {"count": 7, "length": 24, "seed": 5, "bos": 0, "batch_size": 3}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """``model(name)`` → (Megatron checkpoint of TP 1, Hugging Face directory)."""
    made: dict[str, tuple[str, Path]] = {}

    def get(name):
        if name not in made:
            family, changes = MODELS[name]
            home = tmp_path_factory.mktemp("sampled")
            source = tiny(family, **changes)
            if name == "layers that differ":
                config, beside = per_layer.mixed(family), source
                source = per_layer.write_model(home / "hf", config, FAMILIES.get(family), beside=beside)
            convert(ConvertOptions(load=str(source), save=str(home / "megatron")), World())
            made[name] = str(home / "megatron"), source
        return made[name]

    return get


@pytest.fixture(scope="module")
def by_transformers(model):
    """``by_transformers(name)`` → (logits of ``TOKENS``, samples) of stock transformers, once per model; of the formulas where it
    has no class."""

    @functools.cache
    def get(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        folder = model(name)[1]
        if name == "layers that differ":
            return oracle.logits(*oracle.model_of(folder), TOKENS), sample_hf(folder, **OPTIONS)
        return tiny_module.logits(folder, TOKENS), sample_hf(folder, **OPTIONS)

    return get


@pytest.mark.parametrize("name, tp, pp, pieces", CACHED)
def test_logits_with_a_cache_equal_those_of_a_full_forward_pass(model, by_transformers, ranks, name, tp, pp, pieces):
    checkpoint, _ = model(name)
    expected = by_transformers(name)[0][:, torch.tensor(pieces).cumsum(0) - 1]
    found = ranks(tp * pp).run(jobs.cached_logits, checkpoint, TOKENS.tolist(), pieces, tp, pp)
    assert [value is not None for value in found] == [False] * tp * (pp - 1) + [True] * tp
    for value in found[-tp:]:
        assert value.shape == expected.shape
        assert (torch.from_numpy(value) - expected).abs().max() < TOLERANCE * expected.std()


@pytest.mark.parametrize("size, tp, pp", [(1, 1, 1), (2, 2, 1), (3, 3, 1), (2, 1, 2), (2, 1, 1), (3, 1, 1), (4, 2, 1), (4, 2, 2)])
@pytest.mark.parametrize("name", ["llama", "window", "qwen3"])
def test_samples_are_the_same_at_every_layout_and_by_transformers(model, by_transformers, ranks, name, size, tp, pp):
    checkpoint, _ = model(name)
    expected = by_transformers(name)[1]
    for value, reports in ranks(size).run(jobs.sampled, checkpoint, tp, pp, OPTIONS):
        assert value.dtype == numpy.int64 and value.shape == (7, 24)
        assert numpy.array_equal(value, expected.numpy())
        assert reports == sorted(reports) and reports[-1] == 7 * 24


def test_samples_of_a_model_whose_layers_differ(model, by_transformers, ranks):
    checkpoint, _ = model("layers that differ")
    for value, _ in ranks(4).run(jobs.sampled, checkpoint, 2, 2, OPTIONS):
        assert numpy.array_equal(value, by_transformers("layers that differ")[1].numpy())


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_neither_the_batch_size_nor_the_number_of_samples_matters(model, ranks, batch_size):
    checkpoint, _ = model("qwen2")
    ((expected, _),) = ranks(1).run(jobs.sampled, checkpoint, 1, 1, {**OPTIONS, "count": 9})
    ((found, _),) = ranks(1).run(jobs.sampled, checkpoint, 1, 1, {**OPTIONS, "batch_size": batch_size})
    assert numpy.array_equal(found, expected[:7])


def test_more_processes_than_samples(model, ranks):
    checkpoint, _ = model("qwen2")
    ((expected, _),) = ranks(1).run(jobs.sampled, checkpoint, 1, 1, OPTIONS)
    found = ranks(3).run(jobs.sampled, checkpoint, 1, 1, {**OPTIONS, "count": 2})
    assert all(numpy.array_equal(value, expected[:2]) for value, _ in found)
    assert found[0][1][-1] == 2 * 24


def test_a_seed_gives_its_samples_again_and_another_gives_others(model, ranks):
    checkpoint, _ = model("qwen2")
    first, again, other = (ranks(1).run(jobs.sampled, checkpoint, 1, 1, {**OPTIONS, "seed": seed})[0][0] for seed in (5, 5, 6))
    assert numpy.array_equal(first, again)
    assert len(numpy.unique(numpy.concatenate([first, other]), axis=0)) == 14


def test_a_sample_begins_with_bos_and_one_random_token_or_the_latter_only(model, ranks):
    checkpoint, source = model("llama")
    draws = Draws.of(range(7), length=24, seed=5, bos=0, vocab_size=307)
    without = Draws.of(range(7), length=24, seed=5, bos=None, vocab_size=307)
    assert draws.start.shape == (7, 2) and (draws.start[:, 0] == 0).all() and len(draws.start[:, 1].unique()) > 4
    assert torch.equal(without.start, draws.start[:, 1:])
    ((found, _),) = ranks(1).run(jobs.sampled, checkpoint, 1, 1, OPTIONS)
    assert numpy.array_equal(found[:, :2], draws.start.numpy())
    options = {**OPTIONS, "bos": None}
    for value, _ in ranks(2).run(jobs.sampled, checkpoint, 1, 2, options):
        assert numpy.array_equal(value[:, :1], without.start.numpy())
        assert numpy.array_equal(value, sample_hf(source, **options).numpy())


def test_the_random_tokens_are_uniform_over_the_vocabulary():
    starts = Draws.of(range(6000), length=3, seed=1, bos=None, vocab_size=12).start[:, 0]
    assert _chi_square(starts, torch.full((12,), 1 / 12)) < 31.3  # exceeded once in a thousand (11 degrees of freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_third_tokens_follow_the_models_distribution(model, ranks, temperature):
    """Every third token is judged by the conditional distribution that transformers gives it (mid-point transform)."""
    checkpoint, source = model("llama")
    options = {"count": 2000, "length": 4, "seed": 2, "bos": 0, "batch_size": 500, "temperature": temperature}
    ((found, _),) = ranks(1).run(jobs.sampled, checkpoint, 1, 1, options)
    texts = torch.from_numpy(found)
    probabilities = (tiny_module.logits(source, texts)[:, 1:3] / temperature).double().softmax(dim=2)
    # tokens by falling probability: the ranks that were drawn, against the mean distribution over ranks
    falling, order = probabilities.flatten(0, 1).sort(dim=1, descending=True)
    drawn = (order == texts[:, 2:].flatten()[:, None]).int().argmax(dim=1)
    edges = torch.tensor([0, 1, 2, 4, 8, 16, 40, 307])
    expected = torch.stack([falling[:, low:high].sum(dim=1).mean() for low, high in pairwise(edges)])
    bins = torch.bucketize(drawn, edges[1:], right=True)
    assert _chi_square(bins, expected) < 22.5  # once in a thousand (6 degrees of freedom); less, since rows differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_with_their_probabilities_and_never_those_of_probability_zero(dtype):
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, 2.0, -1.0, -torch.inf, 0.5, -3.0, -torch.inf]).to(dtype)
    generator = numpy.random.default_rng(3)
    uniforms = torch.from_numpy(generator.random(20000))
    drawn = choose(logits.expand(20000, -1), uniforms)
    assert _chi_square(drawn, logits.double().softmax(dim=0)) < 20.5  # once in a thousand (5 degrees of freedom)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits.expand(2, -1), ends).tolist() == [1, 8]


def test_drawing_inverts_the_distribution_function_of_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 50257, generator=generator)
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        cumulative = (logits.double() / temperature).softmax(dim=1).cumsum(dim=1)
        drawn = choose(logits, uniforms, temperature)[:, None]
        assert (cumulative.gather(1, drawn)[:, 0] > uniforms - 1e-6).all()
        assert (cumulative.gather(1, (drawn - 1).clamp(min=0))[:, 0] < uniforms + 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(bad):
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    assert (choose(logits, torch.full((3,), 0.5, dtype=torch.float64)) < 0).tolist() == [False, True, False]


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_a_model_of_nan_is_refused_on_every_process(model, ranks, tp, pp):
    checkpoint, _ = model("llama")
    with pytest.raises(RankFailed, match="not finite") as failed:
        ranks(tp * pp).run(jobs.sampled_from_nan, checkpoint, tp, pp, OPTIONS)
    assert failed.value.kinds == {rank: "InputError" for rank in range(tp * pp)}


@pytest.mark.parametrize(
    "change, message", [({"length": 2}, "at least 3"), ({"length": 65}, "at most"), ({"bos": 307}, "below 307")]
)
def test_what_does_not_fit_the_model_is_refused(model, ranks, change, message):
    checkpoint, source = model("llama")
    with pytest.raises(InputError, match=message):
        sample_hf(source, **{**OPTIONS, **change})
    with pytest.raises(RankFailed, match=message) as failed:
        ranks(2).run(jobs.sampled, checkpoint, 2, 1, {**OPTIONS, **change})
    assert set(failed.value.kinds.values()) == {"InputError"}


def test_transformers_own_generation_settings_are_not_used(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = tiny("qwen2")
    expected = sample_hf(source, **OPTIONS)
    changed = AutoModelForCausalLM.from_pretrained(source)
    changed.generation_config = GenerationConfig(
        do_sample=True, repetition_penalty=3.0, temperature=0.1, top_k=2, eos_token_id=list(range(1, 307)), pad_token_id=1
    )
    changed.save_pretrained(tmp_path)
    assert torch.equal(sample_hf(tmp_path, **OPTIONS), expected)


def _chi_square(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    assert len(counts) == len(probabilities) and not counts[probabilities == 0].any()
    expected = (probabilities * len(drawn))[probabilities > 0]
    return ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item()
