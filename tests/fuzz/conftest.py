"""Makes the modules beside it importable, and builds what is damaged once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    from materials import Materials

    return Materials(tmp_path_factory.mktemp("fuzz"))
