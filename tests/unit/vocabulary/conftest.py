"""One tokenizer of every kind, made once, and trimmed ones of it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy
import pytest
from tokenizer_kinds import KINDS

from megatron_prune.checkpoint.huggingface import copy_side_files
from megatron_prune.vocabulary.counting import count_texts
from megatron_prune.vocabulary.selection import Wanted, select
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import Vocabulary, open_vocabulary


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """``made("llama2")`` → directory of that tokenizer."""
    built: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in built:
            built[kind] = KINDS[kind](tmp_path_factory.mktemp(kind))
        return built[kind]

    return get


@pytest.fixture(scope="session")
def opened(made):
    """``opened("llama2")`` → that tokenizer, opened once: what must stay is asked of a process that renders templates."""
    return functools.cache(lambda kind: open_vocabulary(made(kind)))


@pytest.fixture(scope="session")
def cut(made, opened, tmp_path_factory):
    """``cut("llama2", 0.5)`` → (whole, trimmed, the written one): that share of what may go stays."""
    done: dict[tuple[str, float], tuple[Vocabulary, Trimmed, Vocabulary]] = {}

    def get(kind: str, share: float = 0.4) -> tuple[Vocabulary, Trimmed, Vocabulary]:
        if (kind, share) not in done:
            whole = open_vocabulary(made(kind), opened(kind).rows + 3)
            counts = count_texts(["the model and its tokens are pruned, the rest stays"] * 3, whole).astype(numpy.float64)
            free = whole.rows - len(whole.pinned)
            rows = select(whole, counts, Wanted(size=len(whole.pinned) + int(share * free))).rows
            trimmed = Trimmed(vocabulary=whole, rows=rows)
            folder = tmp_path_factory.mktemp("cut")
            copy_side_files(whole.folder, folder)
            trimmed.write(folder)
            done[kind, share] = whole, trimmed, open_vocabulary(folder, len(rows))
        return done[kind, share]

    return get
