"""The losses of recovery over a vocabulary that is split over ranks, against torch in one process in float64.

Tolerances as in ``tests/unit/recovery/test_loss.py``: what ranks add up changes the order of sums only.
"""

from __future__ import annotations

import pytest
import rank_jobs_recovery as jobs
import torch
from recovery_reference import coarse_kl_divergence, kl_divergence
from torch.nn import functional

VALUE, GRADIENT = 2e-5, 4e-6
TOKENS, BATCH, K = 6, 2, 5
WIDTHS = {
    "every rank has real tokens": (37, 48),
    "no padding": (48, 48),
    "the last rank has padding alone": (14, 48),
    "only the first rank has a real token": (9, 60),
}
"""tokens of the vocabulary, with padding."""


def draw(*shape: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(
    vocab: int, width: int, teacher: str, weight: float, temperature: float, dtype: str
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """What ranks are given, and the losses and the gradient that torch makes of the same."""
    shape = (TOKENS, BATCH, width)
    logits, taught = (draw(*shape, seed=seed).to(getattr(torch, dtype)).float() for seed in (0, 2))
    labels = torch.randint(0, vocab, shape[:2], generator=torch.Generator().manual_seed(9))
    labels[0], labels[-1] = 0, vocab - 1
    upstream = draw(*shape[:2], seed=1, scale=1.0)
    case = {"logits": logits.numpy(), "labels": labels.numpy(), "upstream": upstream.numpy(), "dtype": dtype}
    case |= {"weight": weight, "temperature": temperature}

    leaf, real = logits[..., :vocab].double().requires_grad_(), taught[..., :vocab].double()
    plain = functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    divergence = torch.zeros_like(plain)
    if teacher == "running":
        case["teacher"] = taught.numpy()
        divergence = kl_divergence(leaf, real, temperature)
    elif teacher == "listed":
        probable, ids = (real / temperature).log_softmax(-1).topk(K)
        case |= {"ids": ids.numpy(), "log_probs": probable.numpy()}
        divergence = coarse_kl_divergence(leaf, ids, probable, temperature)
    total = (1 - weight) * plain + weight * temperature**2 * divergence
    total.backward(upstream.double())
    gradient = torch.zeros(shape, dtype=torch.float64)
    gradient[..., :vocab] = leaf.grad
    return case, torch.stack([total, plain, divergence]).detach(), gradient


TEACHERS = [(teacher, *how) for teacher in ("running", "listed") for how in ((1.0, 1.0), (0.3, 2.0))]
"""kind, weight, temperature."""


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_losses_and_gradients_are_those_of_the_whole_vocabulary_on_every_rank(ranks, tp, width):
    vocab, padded = WIDTHS[width]
    made = [make(vocab, padded, *how, "float32") for how in (("none", 0.0, 1.0), *TEACHERS)]
    by_rank = ranks(tp).run(jobs.losses, tp, vocab, [case for case, *_ in made])
    for (case, losses, gradient), found in zip(made, zip(*by_rank), strict=True):
        assert all((mine == found[0][0]).all() for mine, _ in found)
        torch.testing.assert_close(torch.from_numpy(found[0][0]).double(), losses, rtol=VALUE, atol=VALUE)
        parts = torch.cat([torch.from_numpy(part) for _, part in found], dim=-1)
        torch.testing.assert_close(parts.double(), gradient, rtol=0, atol=GRADIENT)
        assert (parts[..., vocab:] == 0).all()


@pytest.mark.parametrize("tp", [2, 3])
def test_logits_in_bf16_lose_nothing_but_the_rounding_of_their_gradient(ranks, tp):
    case, losses, gradient = make(37, 48, "running", 0.5, 2.0, "bfloat16")
    found = [rank[0] for rank in ranks(tp).run(jobs.losses, tp, 37, [case])]
    torch.testing.assert_close(torch.from_numpy(found[0][0]).double(), losses, rtol=VALUE, atol=VALUE)
    parts = torch.cat([torch.from_numpy(part) for _, part in found], dim=-1)
    # twice half a step of bf16: when it is stored, and when it is multiplied with what comes from above
    torch.testing.assert_close(parts.double(), gradient, rtol=1.1 * torch.finfo(torch.bfloat16).eps, atol=1e-6)
