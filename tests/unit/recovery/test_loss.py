"""The losses of recovery in one process, against torch's own cross-entropy and KL divergence with autograd in float64.

Ours computes in float32. A loss is a difference of numbers of about the logits' size and the logarithm of the vocabulary,
so its error is some 1e-7 of 10 to 20; a gradient's is 1e-7 of 1. A missing factor T, a rest that is counted twice or a
padding column that takes part changes either by 1e-3 and more: 2e-5 and 2e-6 tell the two apart.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recovery_reference import coarse_kl_divergence, kl_divergence
from torch.nn import functional

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.recovery import loss as module
from megatron_prune.recovery.loss import Distillation, TeacherLogits, TeacherTopK, vocab_parallel_losses
from megatron_prune.runtime.model import start_parallel, stop_parallel
from megatron_prune.runtime.world import World

VALUE, GRADIENT = 2e-5, 2e-6


@pytest.fixture(scope="module", autouse=True)
def parallel():
    start_parallel(ParallelLayout(), World())
    yield
    stop_parallel()


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_labels(*shape: int, vocab: int, seed: int = 9) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def top_k(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and float64 log-probabilities of the k most probable, in no particular order."""
    probable, ids = (teacher.double() / temperature).log_softmax(-1).topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    return ids[..., order], probable[..., order]


def expected(logits, labels, upstream, *, teacher=None, listed=None, weight=0.0, temperature=1.0):
    """Losses [3, tokens, batch] and the gradient with respect to the logits, in float64."""
    leaf = logits.double().requires_grad_()
    plain = functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    divergence = torch.zeros_like(plain)
    if teacher is not None:
        divergence = kl_divergence(leaf, teacher.double(), temperature)
    elif listed is not None:
        divergence = coarse_kl_divergence(leaf, *listed, temperature)
    total = (1 - weight) * plain + weight * temperature**2 * divergence
    total.backward(upstream.double())
    return torch.stack([total, plain, divergence]).detach(), leaf.grad


def ours(logits, labels, upstream, vocab, teacher=None, *, weight=0.0, temperature=1.0):
    leaf = logits.clone().requires_grad_()
    distillation = Distillation(weight=weight, temperature=temperature)
    found = vocab_parallel_losses(leaf * 1.0, labels, vocab, teacher, distillation)
    assert all(loss.dtype is torch.float32 for loss in found)
    assert [loss.requires_grad for loss in found] == [True, False, False]
    found[0].backward(upstream)
    return torch.stack(found).detach(), leaf.grad


def close(found, wanted, value: float = VALUE, gradient: float = GRADIENT) -> None:
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=value, atol=value)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=0, atol=gradient)


def test_cross_entropy_and_its_gradient_are_torchs():
    logits, labels, upstream = draw(7, 3, 50), draw_labels(7, 3, vocab=50), draw(7, 3, seed=1, scale=1.0)
    close(ours(logits, labels, upstream, 50), expected(logits, labels, upstream))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_divergence_from_a_running_teacher_is_torchs_at_every_weight_and_temperature(weight, temperature):
    logits, teacher, labels = draw(5, 2, 40), draw(5, 2, 40, seed=2), draw_labels(5, 2, vocab=40)
    upstream, how = draw(5, 2, seed=1, scale=1.0), {"weight": weight, "temperature": temperature}
    found = ours(logits, labels, upstream, 40, TeacherLogits(logits=teacher.clone()), **how)
    wanted = expected(logits, labels, upstream, teacher=teacher, **how)
    assert wanted[0][2].min() > 0.1  # they do differ
    close(found, wanted)


@pytest.mark.parametrize("weight, temperature, k", [(1.0, 1.0, 4), (0.3, 2.0, 4), (0.3, 0.5, 1), (1.0, 2.0, 39), (0.0, 1.0, 4)])
def test_the_divergence_from_the_most_probable_tokens_counts_all_others_as_one(weight, temperature, k):
    logits, teacher, labels = draw(5, 2, 40), draw(5, 2, 40, seed=2), draw_labels(5, 2, vocab=40)
    upstream, how = draw(5, 2, seed=1, scale=1.0), {"weight": weight, "temperature": temperature}
    listed = top_k(teacher, k, temperature)
    assert k == 39 or (1 - listed[1].exp().sum(-1)).min() > 1e-4  # there is a rest to count
    found = ours(logits, labels, upstream, 40, TeacherTopK(ids=listed[0], log_probs=listed[1].float()), **how)
    close(found, expected(logits, labels, upstream, listed=listed, **how), gradient=GRADIENT * 4)
    whole = expected(logits, labels, upstream, teacher=teacher, **how)[0][2]
    assert (found[0][2].double() < whole + VALUE).all()  # a lower bound


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_listed_is_the_full_divergence(temperature):
    logits, teacher, labels = draw(5, 2, 40), draw(5, 2, 40, seed=2), draw_labels(5, 2, vocab=40)
    upstream, how = draw(5, 2, seed=1, scale=1.0), {"weight": 1.0, "temperature": temperature}
    ids, probable = top_k(teacher, 40, temperature)
    found = ours(logits, labels, upstream, 40, TeacherTopK(ids=ids, log_probs=probable.float()), **how)
    close(found, expected(logits, labels, upstream, teacher=teacher, **how))


def test_a_student_that_is_sure_where_the_teacher_is_not_gets_the_exact_gradient_of_the_listed_tokens():
    """Outside the list the student has 1e-10 and the teacher 1e-2: their ratio must not enter the listed tokens' gradient."""
    vocab, k = 40, 5
    teacher = torch.zeros(1, 1, vocab)
    teacher[..., :k] = 6.0
    logits = torch.full((1, 1, vocab), -26.0)
    logits[..., :k] = draw(k, scale=0.5)
    listed = top_k(teacher, k, 1.0)
    assert 1e-2 < 1 - listed[1].exp().sum() < 0.1
    labels, upstream = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    wanted = expected(logits, labels, upstream, listed=listed, weight=1.0)
    found = ours(logits, labels, upstream, vocab, TeacherTopK(ids=listed[0], log_probs=listed[1].float()), weight=1.0)
    torch.testing.assert_close(found[1][..., :k].double(), wanted[1][..., :k], rtol=0, atol=1e-5)
    assert found[1].abs().max() < 1.0


def test_a_student_that_is_its_teacher_learns_nothing():
    logits, labels, upstream = draw(4, 2, 60), draw_labels(4, 2, vocab=60), torch.ones(4, 2)
    for temperature in (1.0, 3.0):
        ids, probable = top_k(logits, 7, temperature)
        for teacher in (TeacherLogits(logits=logits.clone()), TeacherTopK(ids=ids, log_probs=probable.float())):
            losses, gradient = ours(logits, labels, upstream, 60, teacher, weight=1.0, temperature=temperature)
            assert losses[0].abs().max() < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("teacher", ["none", "running", "listed"])
def test_padding_takes_no_probability_and_no_gradient_whatever_it_holds(teacher):
    vocab, width = 37, 48
    logits, taught, labels = draw(6, 2, vocab), draw(6, 2, vocab, seed=2), draw_labels(6, 2, vocab=vocab)
    upstream, how = draw(6, 2, seed=1, scale=1.0), {"weight": 0.4, "temperature": 2.0}
    listed = top_k(taught, 5, 2.0)
    wide = lambda narrow, filled: torch.cat([narrow, torch.full((6, 2, width - vocab), filled)], dim=-1)
    for filled in (0.0, 1e4, -1e4, float("inf"), float("nan")):
        answers = {
            "none": None,
            "running": TeacherLogits(logits=wide(taught, filled)),
            "listed": TeacherTopK(ids=listed[0], log_probs=listed[1].float()),
        }
        found = ours(wide(logits, filled), labels, upstream, vocab, answers[teacher], **how)
        given = {"running": {"teacher": taught}, "listed": {"listed": listed}}.get(teacher, {})
        wanted = expected(logits, labels, upstream, **given, **(how if given else {}))
        assert (found[1][..., vocab:] == 0).all() or not torch.isfinite(torch.tensor(filled)), "padding has a gradient"
        close((found[0], found[1][..., :vocab]), wanted, gradient=GRADIENT * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distilled", [False, True])
def test_logits_of_16_bits_lose_nothing_but_the_rounding_of_their_gradient(dtype, distilled):
    logits, teacher = draw(6, 2, 70).to(dtype), draw(6, 2, 70, seed=2).to(dtype)
    labels, upstream = draw_labels(6, 2, vocab=70), torch.ones(6, 2)
    how = {"weight": 0.5, "temperature": 2.0} if distilled else {}
    found = ours(logits, labels, upstream, 70, TeacherLogits(logits=teacher.clone()) if distilled else None, **how)
    wanted = expected(logits.float(), labels, upstream, teacher=teacher.float() if distilled else None, **how)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=VALUE, atol=VALUE)
    assert found[1].dtype is dtype
    step = torch.finfo(dtype).eps  # two roundings of at most half of it each: when stored, and when multiplied with upstream's
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1.1 * step, atol=1e-7)


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_logits_far_from_zero_do_not_overflow(offset):
    """exp(1000) is infinite; float32 has steps of 6e-5 there."""
    logits, teacher, labels = draw(4, 2, 30) + offset, draw(4, 2, 30, seed=2) - offset, draw_labels(4, 2, vocab=30)
    upstream = torch.ones(4, 2)
    for how in ({}, {"teacher": teacher, "weight": 1.0, "temperature": 0.5}):
        answer = TeacherLogits(logits=teacher) if how else None
        found = ours(logits, labels, upstream, 30, answer, **{name: value for name, value in how.items() if name != "teacher"})
        close(found, expected(logits, labels, upstream, **how), 2e-3, 2e-4)


def test_how_many_rows_go_through_together_changes_nothing(monkeypatch):
    logits, teacher, labels = draw(7, 3, 33), draw(7, 3, 33, seed=2), draw_labels(7, 3, vocab=33)
    upstream, how = draw(7, 3, seed=1, scale=1.0), {"weight": 0.3, "temperature": 2.0}
    ids, probable = top_k(teacher, 4, 2.0)
    for answer in (None, TeacherLogits(logits=teacher), TeacherTopK(ids=ids, log_probs=probable.float())):
        monkeypatch.setattr(module, "_ROWS_ELEMENTS", 1 << 22)
        together = ours(logits, labels, upstream, 33, answer, **how)
        for rows in (1, 4, 20):  # 21 rows: also a part that is not filled
            monkeypatch.setattr(module, "_ROWS_ELEMENTS", rows * 33 + 5)
            apart = ours(logits, labels, upstream, 33, answer, **how)
            close((apart[0], apart[1]), (together[0].double(), together[1].double()), 1e-6, 1e-7)


def test_the_gradient_lies_in_the_memory_of_the_logits():
    labels = draw_labels(4, 2, vocab=20)
    leaf = draw(4, 2, 20).requires_grad_()
    logits = leaf * 1.0
    place, gradients = logits.data_ptr(), []
    logits.register_hook(gradients.append)
    vocab_parallel_losses(logits, labels, 20)[0].sum().backward()
    assert gradients[0].data_ptr() == place


def test_without_a_gradient_the_losses_are_the_same():
    logits, teacher, labels = draw(4, 2, 20), draw(4, 2, 20, seed=2), draw_labels(4, 2, vocab=20)
    for answer in (None, TeacherLogits(logits=teacher.clone())):
        wanted = ours(logits, labels, torch.ones(4, 2), 20, answer, weight=0.5, temperature=2.0)[0]
        with torch.no_grad():
            how = Distillation(weight=0.5, temperature=2.0)
            found = torch.stack(vocab_parallel_losses(logits.clone(), labels, 20, answer, how))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_teachers_logits_stay_as_they_are():
    logits, teacher, labels = draw(4, 2, 20), draw(4, 2, 20, seed=2), draw_labels(4, 2, vocab=20)
    for temperature in (1.0, 2.0):
        kept = teacher.clone()
        ours(logits, labels, torch.ones(4, 2), 20, TeacherLogits(logits=kept), weight=1.0, temperature=temperature)
        assert torch.equal(kept, teacher)


@given(
    st.integers(2, 60), st.integers(1, 4), st.integers(1, 3), st.floats(0, 1), st.floats(0.3, 5), st.data(), st.integers(0, 999)
)
def test_any_shape_weight_and_temperature(vocab, tokens, batch, weight, temperature, data, seed):
    logits, teacher = draw(tokens, batch, vocab, seed=seed, scale=2.0), draw(tokens, batch, vocab, seed=seed + 1, scale=2.0)
    labels, upstream = draw_labels(tokens, batch, vocab=vocab, seed=seed), draw(tokens, batch, seed=seed + 2, scale=1.0)
    how = {"weight": weight, "temperature": temperature}
    found = ours(logits, labels, upstream, vocab, TeacherLogits(logits=teacher.clone()), **how)
    close(found, expected(logits, labels, upstream, teacher=teacher, **how), VALUE * 10, GRADIENT * 10)
    listed = top_k(teacher, data.draw(st.integers(1, vocab)), temperature)
    found = ours(logits, labels, upstream, vocab, TeacherTopK(ids=listed[0], log_probs=listed[1].float()), **how)
    wanted = expected(logits, labels, upstream, listed=listed, **how)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=2e-3, atol=2e-3)  # a rest near 0 is a difference of sums
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=0, atol=2e-3)
