"""What several files of this folder begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import copy_model


@pytest.fixture
def model(tiny, tmp_path):
    """Makes a writable copy of a tiny model (see ``copy_model``)."""

    def make(family="llama", change=lambda tensors: None, config={}, **changes) -> Path:
        return copy_model(tiny(family, **changes), tmp_path / "hf", change, **config)

    return make
