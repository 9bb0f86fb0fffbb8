"""A tiny tokenizer, texts, and a ``datasets.load_dataset`` that serves tables from memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def folder(tiny) -> Path:
    """Directory of a tiny model: its tokenizer has 307 tokens."""
    return tiny("llama")


@pytest.fixture(scope="session")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def ids(tokenizer):
    """text → int64 [n], by the tokenizer alone."""
    return lambda text: torch.tensor(tokenizer(text)["input_ids"])


@pytest.fixture
def served(monkeypatch):
    """``served({"id": {"split": {"column": [...]}}})`` → the calls made; ids that are not there fail as the library does."""
    import datasets

    calls: list[tuple[tuple, dict]] = []

    def serve(tables):
        def load_dataset(*args, split=None, **options):
            calls.append((args, {**options, "split": split}))
            if args[0] not in tables:
                raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{args[0]}' doesn't exist on the Hub.\nmore")
            found = {name: datasets.Dataset.from_dict(columns) for name, columns in tables[args[0]].items()}
            if split is None:
                return datasets.DatasetDict(found)
            if split not in found:
                raise ValueError(f'Unknown split "{split}". Should be one of {list(found)}.')
            return found[split]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


@pytest.fixture
def load(folder):
    """``load("a.txt:1", nsamples=4, …)`` → Calibration with the sizes of the tiny model."""
    from megatron_prune.text.data_specs import parse_data
    from megatron_prune.text.sources import load_calibration

    def run(*specs, **changes):
        options = {"tokenizer_dir": folder, "seq_length": 8, "nsamples": 4, "seed": 0}
        sizes = {"max_position_embeddings": 64, "vocab_size": 307}
        return load_calibration(parse_data(list(specs)), **{**options, **sizes, **changes})

    return run
