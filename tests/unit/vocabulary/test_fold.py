"""The rows that take over what dropped tokens said, against the normal equations written out in float64."""

from __future__ import annotations

import numpy
import pytest
import torch
from tiny import build_tiny

from megatron_prune.checkpoint import huggingface
from megatron_prune.runtime.huggingface_stage import HuggingFaceStage
from megatron_prune.runtime.world import World
from megatron_prune.surgery import fold_tokens
from megatron_prune.surgery.fold_tokens import changing_rows, first_pieces, fold_rows, hidden_states, respelled
from megatron_prune.text.tokens import Calibration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, vocab_size=703, dtype="float32", tie_word_embeddings=False)
    return huggingface.open_model(folder)


def calibration(tokens: torch.Tensor, lengths: list[int]) -> Calibration:
    weights = torch.ones(len(tokens), dtype=torch.float64)
    return Calibration(tokens=tokens, lengths=torch.tensor(lengths), weights=weights)


def test_rows_solve_the_weighted_least_squares_problem(model, cut):
    _, trimmed, _ = cut("byte_level", 0.2)
    ids, generator = trimmed.id_map, torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 48, generator=generator) * 2
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=8)
    found = fold_rows(model.tensors, ids, hidden, stage, World())
    matrix = huggingface.open_model(model.path).tensors.read_block(fold_tokens.TensorId("output"), range(703)).double()
    first, states = first_pieces(ids), hidden.double()
    logits = states @ matrix.T
    total = logits.logsumexp(dim=1)
    moment = states.T @ states / len(states)
    moment += 1e-3 * moment.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    changing = sorted(set(first[first >= 0].tolist()))
    assert found.tokens.tolist() == changing and len(changing) == changing_rows(ids) > 20
    for token, row in zip(changing, found.rows):
        members = [token, *numpy.flatnonzero(first == token).tolist()]
        wanted = logits[:, members].logsumexp(dim=1)
        weight = (wanted - total).exp()
        left = (states * weight[:, None]).T @ states + fold_tokens.RIDGE * moment
        right = (states * weight[:, None]).T @ (wanted - logits[:, token])
        expected = matrix[token] + torch.linalg.solve(left, right)
        torch.testing.assert_close(row.double(), expected, rtol=2e-3, atol=2e-4)
    head = matrix.float().clone()
    untouched = sorted(set(range(703)) - set(changing))
    assert torch.equal(found.put_into(head.clone())[untouched], head[untouched])


def test_a_row_that_no_dropped_token_begins_with_is_not_touched(cut):
    whole, trimmed, _ = cut("byte_level", 0.2)
    first, split = first_pieces(trimmed.id_map), whole.splitter(trimmed.new_ids)
    for token in range(whole.rows):
        if token in trimmed.new_ids or token not in whole.pieces:
            assert first[token] == -1
        else:
            assert first[token] == split(token)[0]


def test_samples_are_spelled_as_the_trimmed_tokenizer_spells_them(cut):
    whole, trimmed, _ = cut("byte_level", 0.2)
    dropped = [token for token in whole.main.pieces if token not in trimmed.new_ids][:3]
    kept = trimmed.rows[5:9].tolist()
    tokens = torch.tensor([[*dropped, *kept, 0], [*kept, *dropped, 0]])
    found = respelled(calibration(tokens, [7, 5]), trimmed.id_map)
    split = whole.splitter(trimmed.new_ids)
    for row, length, before in zip(found.tokens.tolist(), found.lengths.tolist(), (tokens[0, :7], tokens[1, :5])):
        spelled = [part for token in before.tolist() for part in ([token] if token in trimmed.new_ids else split(token))]
        assert length == min(len(spelled), len(before))
        assert row[:length] == spelled[:length] and not any(row[length:])


def test_hidden_states_are_those_of_stock_transformers(model):
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 703, (3, 12), generator=torch.Generator().manual_seed(1))
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=12)
    seen: list[int] = []
    found = hidden_states(model.tensors, calibration(tokens, [12, 7, 12]), stage, World(), torch.float32, seen.append)
    reference = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).model
    with torch.no_grad():
        expected = torch.cat([reference(row[None, :length]).last_hidden_state[0] for row, length in zip(tokens, (12, 7, 12))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(seen) == 4 * 36
