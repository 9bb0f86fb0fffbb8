"""Second moments of whole numbers, which no rounding touches, against the plain product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.importance.moments import BLOCK_WIDTH, Moment


class OneOf:
    """A rank's stage; the ranks run one after the other, and the last finds the others' rows in ``parts``."""

    device = torch.device("cpu")

    def __init__(self, rank, ranks, parts):
        self.rank, self.ranks, self._parts = rank, ranks, parts

    def share(self, extent):
        return range(extent * self.rank // self.ranks, extent * (self.rank + 1) // self.ranks)

    def sum_copies(self, value):
        return value

    def gather_rows(self, local, extent):
        return torch.cat([*self._parts, local])


def whole_numbers(*shape, seed):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture(scope="module")
def small_chunks():
    """Chunks of 3 tokens, so that 5 of them are not one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_prune.importance.moments.CHUNK_TOKENS", 3)
        yield


@settings(max_examples=40, deadline=None)
@given(
    features=st.one_of(st.integers(4, 60), st.integers(BLOCK_WIDTH, 8 * BLOCK_WIDTH)),
    beside=st.integers(0, 40),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_pair_is_summed_once(features, beside, ranks, seed, small_chunks):
    values, others = (whole_numbers(2, 5, width, seed=seed + place) for place, width in enumerate((features, beside)))
    weights = whole_numbers(2, 5, seed=seed + 2)
    left, right = values.flatten(0, 1) * weights.flatten()[:, None], torch.cat([values, others], dim=-1).flatten(0, 1)
    parts = []
    for rank in range(ranks):
        moment = Moment(OneOf(rank, ranks, parts), features, beside)
        for sample in range(2):
            moment.add(values[sample], weights[sample], others[sample] if beside else None)
        parts.append(moment._sum)
    parts.pop()
    found = moment.whole()
    assert found.dtype == torch.float64
    assert torch.equal(found, (left.T @ right).double())
