"""Fitting a block's matrices together, at every TP × DP, against the same steps taken in float64 on plain matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_jobs_stage as jobs
import torch
from rank_jobs_stage import reconstructed
from tiny import state_dict

from megatron_prune.checkpoint import huggingface
from megatron_prune.importance.walk import layer_reader
from megatron_prune.runtime.huggingface_stage import HuggingFaceStage
from megatron_prune.runtime.stage import added
from megatron_prune.surgery import reconstruct as module
from megatron_prune.surgery.reconstruct import HELD_OUT, RATE, Examples, reconstruct

SAMPLES, TOKENS, PASSES = 21, 300, 3
LAYER = 1
MLP, ATTENTION = {"gate", "up", "down"}, {"q", "k", "v", "o"}


@pytest.fixture(scope="module")
def problem(tiny):
    """A layer, streams that enter it, and what another layer of the model adds to them."""
    folder = tiny("qwen3", dtype="float32")
    tensors = huggingface.open_model(folder).tensors
    generator = torch.Generator().manual_seed(2)
    stream = torch.randn(SAMPLES, TOKENS, tensors.config.hidden_size, generator=generator)
    stage = HuggingFaceStage(huggingface.open_model(folder).family, dtype=torch.float32, seq_length=TOKENS)
    other = stage.layer(tensors.config)
    other.load(layer_reader(tensors, 2))
    values = jobs.values_inside(other, stream, stage)
    return (
        folder,
        stream,
        {"mlp": added(other.blocks[1], stream), "attention": values["write_attention"]},
    )


def single(problem, roles: set[str], passes: int = PASSES) -> dict[str, torch.Tensor]:
    folder, stream, added = problem
    model = huggingface.open_model(folder)
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=TOKENS)
    layer = stage.layer(model.config)
    layer.load(layer_reader(model.tensors, LAYER))
    return reconstructed(layer, stage, stream, added["mlp" if "down" in roles else "attention"], roles, passes)


def weight(folder: Path, name: str) -> torch.Tensor:
    return state_dict(folder)[f"model.layers.{LAYER}.{name}.weight"].double()


def test_the_steps_are_adams_on_the_samples_that_are_not_held_out(problem):
    """One pass in float64, the gradients of a gated block written out."""
    folder, stream, added = problem
    x, wanted = stream.double(), added["mlp"].double()
    norm = weight(folder, "post_attention_layernorm")
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm
    counted = (1.0 + (torch.arange(SAMPLES)[:, None] + torch.arange(TOKENS)) % 3).double()
    mats = {role: weight(folder, f"mlp.{role}_proj") for role in ("gate", "up", "down")}
    held = [n for n in range(SAMPLES) if n % HELD_OUT == HELD_OUT - 1]
    fitted = torch.tensor([n for n in range(SAMPLES) if n not in held])

    def forward(of: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x[of] @ mats["gate"].T, x[of] @ mats["up"].T
        s = a.sigmoid()
        return a, b, s, (a * s * b), (a * s * b) @ mats["down"].T - wanted[of]

    start = (forward(torch.tensor(held))[4].square().sum(-1) * counted[held]).sum()
    each, moments = 1024 // TOKENS, {role: [torch.zeros_like(m), torch.zeros_like(m)] for role, m in mats.items()}
    chunks = fitted[torch.randperm(len(fitted), generator=torch.Generator().manual_seed(0))].split(each)
    for step, chosen in enumerate(chunks):
        a, b, s, h, error = forward(chosen)
        e = (2 * error * counted[chosen][..., None] / start).flatten(0, 1)
        flat = lambda value: value.flatten(0, 1)
        back = e @ mats["down"]
        slope = flat(b * s * (1 + a * (1 - s)))
        gradients = {
            "down": e.T @ flat(h),
            "gate": (back * slope).T @ flat(x[chosen]),
            "up": (back * flat(a * s)).T @ flat(x[chosen]),
        }
        rate = RATE * 0.1 * (1 - step / len(chunks))
        for role, g in gradients.items():
            m, v = moments[role]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g.square())
            mats[role] = mats[role] - rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
    ours = single(problem, MLP, passes=1)
    for role, value in mats.items():
        moved = (value - weight(folder, f"mlp.{role}_proj")).abs().max()
        assert (ours[role].double() - value).abs().max() < 0.02 * moved, role


@pytest.fixture(scope="module", params=[MLP, ATTENTION], ids=["mlp", "attention"])
def alone(request, problem) -> tuple[set[str], dict[str, torch.Tensor]]:
    """The roles that are fitted, and what one process with transformers' layer makes of them."""
    return request.param, single(problem, request.param)


@pytest.mark.parametrize("tp, dp", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_every_layout_takes_the_same_steps(problem, ranks, alone, tp, dp):
    folder, stream, added = problem
    roles, wanted = alone
    asked = added["mlp" if "down" in roles else "attention"].detach().numpy()
    for found in ranks(tp * dp).run(
        jobs.megatron_reconstruct, str(folder), LAYER, stream.numpy(), asked, sorted(roles), tp, PASSES
    ):
        assert found.keys() == roles
        for role, value in found.items():
            moved = (wanted[role] - weight(folder, f"{'mlp' if 'down' in roles else 'self_attn'}.{role}_proj")).abs().max()
            assert (torch.from_numpy(value) - wanted[role]).abs().max() < 0.02 * moved, role


def examples(wanted: torch.Tensor, count: int) -> Examples:
    x = torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(1))
    return Examples(
        numbers=torch.arange(count),
        count=count,
        length=8,
        at=lambda batch: (x[batch], x[batch] @ wanted.T, torch.ones(len(batch), 8)),
    )


@pytest.mark.parametrize("count, exact", [(1, False), (9, True)])
def test_nothing_changes_with_one_sample_or_without_an_error(problem, count, exact):
    stage = HuggingFaceStage(huggingface.open_model(problem[0]).family, dtype=torch.float32, seq_length=8)
    parameter = torch.nn.Parameter(torch.ones(4, 4), requires_grad=False)
    wanted = torch.ones(4, 4) * (1.0 if exact else 2.0)
    assert not reconstruct([(parameter, 1.0)], lambda x: x @ parameter.T, examples(wanted, count), stage, 4)
    assert torch.equal(parameter, torch.ones(4, 4)) and not parameter.requires_grad and parameter.grad is None


def test_what_is_worse_on_held_out_samples_is_taken_back(problem, monkeypatch):
    """The samples that are fitted to want the opposite of the one that is held out."""
    stage = HuggingFaceStage(huggingface.open_model(problem[0]).family, dtype=torch.float32, seq_length=8)
    parameter = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    kind = examples(torch.eye(4), 8)
    at = lambda batch: (
        kind.at(batch)[0],
        kind.at(batch)[1] * torch.where(batch == 7, 1.0, -1.0)[:, None, None],
        kind.at(batch)[2],
    )
    torn = Examples(numbers=kind.numbers, count=8, length=8, at=at)
    monkeypatch.setattr(module, "RATE", 0.1)
    assert not reconstruct([(parameter, 1.0)], lambda x: x @ parameter.T, torn, stage, 4)
    assert torch.equal(parameter, torch.zeros(4, 4))
    assert reconstruct([(parameter, 1.0)], lambda x: x @ parameter.T, kind, stage, 4)
    assert (parameter - torch.eye(4)).norm() < 2.0
