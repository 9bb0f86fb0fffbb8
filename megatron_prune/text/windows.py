"""Text to measure on, as windows from its start."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_prune.text.encoder import Encoder
from megatron_prune.text.reader import Drawn, led, open_reader
from megatron_prune.text.splits import TEST


def read_windows(
    source: str | Path, tokenizer_dir: Path | None, *, seq_length: int, count: int, field: str = "text"
) -> torch.Tensor:
    """The first ``count`` windows of a source (as many as there are), tokenised whole.

    Args:
        source: any source of text of ``load_calibration``; of data sets the evaluation split is taken.
        tokenizer_dir: Hugging Face directory whose tokenizer is used; ``None`` will do for a ``.bin``/``.idx`` pair.
        seq_length: tokens in a window.
        field: name of the text in records.

    Returns:
        int64 [windows, seq_length].

    Raises:
        InputError: if the source cannot be read or holds less than one window.
    """
    return draw_windows(source, tokenizer_dir, seq_length=seq_length, count=count, field=field).tokens


def draw_windows(
    source: str | Path,
    tokenizer_dir: Path | None,
    *,
    seq_length: int,
    count: int,
    field: str = "text",
    leading: int | None = None,
) -> Drawn:
    """:func:`read_windows` with the facts about what was read (``split`` …).

    Args:
        leading: the token that every window begins with, if the model needs one.
    """
    reader = open_reader(str(source), encode=Encoder(tokenizer_dir), field=field, split=TEST)
    if reader.needs_tokenizer:
        reader.encode.load()
    return led(reader.windows(seq_length=seq_length, count=count), leading)
