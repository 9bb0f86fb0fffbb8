"""Fixtures: tiny models built on disk, and pools of gloo ranks that stay up between tests."""

from __future__ import annotations

import gc
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ranks import RankPool
from tiny import FAMILIES, build_tiny


def pytest_addoption(parser):
    parser.addoption("--order", type=int, metavar="SEED", help="run modules, and the tests in each, in a random order")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--order") is None:
        return
    draw, modules = random.Random(config.getoption("--order")), {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    shuffled = list(modules.values())
    for tests in (shuffled, *shuffled):
        draw.shuffle(tests)
    items[:] = [item for tests in shuffled for item in tests]


def pytest_collection_finish(session):
    """Garbage is looked for among what tests make, not each time among all that they import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """So small models run no faster on several, and several wait for each other where two tests run at once."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny("llama", tied=True, …)`` → directory of a tiny Hugging Face model, built once per combination."""
    built: dict[tuple[str, str], Path] = {}

    def get(family: str = "llama", **changes) -> Path:
        key = (family, repr(sorted(changes.items())))
        if key not in built:
            built[key] = build_tiny(tmp_path_factory.mktemp("tiny") / "model", family, **changes)
        return built[key]

    return get


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def ranks():
    """``ranks(3)`` → a pool of three gloo ranks; sizes are fixed by the tests, never by the machine."""
    pools: dict[int, RankPool] = {}

    def get(size: int) -> RankPool:
        if size not in (1, 2, 3, 4):
            raise ValueError("tests use 1, 2, 3 or 4 ranks")
        if size not in pools or not pools[size].alive:
            pools[size] = RankPool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()
