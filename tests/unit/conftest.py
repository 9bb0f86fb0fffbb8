"""Makes ``dense`` importable and gives every test the reference model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile(
    "unit",
    deadline=None,
    max_examples=40,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("unit")


@pytest.fixture
def small():
    """A configuration with every optional tensor: 4 layers, 12 heads in 6 KV groups."""
    from dense import SMALL

    return SMALL
