"""The models that runtimes are tried on, built once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent))

import serving_cases


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE that Qwen2's own class takes too."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tiny._tokenizer(307)
    made.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def built(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Case → its directory."""
    home = tmp_path_factory.mktemp("cases")
    return {name: serving_cases.write(home / name, case, tokenizer) for name, case in serving_cases.CASES.items()}
