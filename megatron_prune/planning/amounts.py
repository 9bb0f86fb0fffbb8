"""How much text is run at a time, and how much of it there is, where nothing else is asked for: what memory and time follow from."""

from __future__ import annotations

SEQ_LENGTH = 512
"""Tokens in a sample."""

BATCH_TOKENS = 4096
"""Tokens that go through a layer together."""

SAMPLED_TOGETHER = 96
"""Samples made in a batch: a token costs half of what it does 32 at a time (weights are read once for all)."""

PROBED = 8
"""Samples that losses of probes are measured on: spread evenly over the text, so that all its sources are among them."""

AFTER = 4
"""Layers after cut ones that are fitted with the one before them."""

STEP_TOKENS = 1024
"""Tokens of a step of a joint fit."""

WINDOW_PASSES = 2
"""Passes over the text for a window of layers, where a block of its own takes one."""

HELD_OUT = 8
"""One sample in so many is not fitted to jointly but looked at."""

SAMPLED_ROWS = 2048
"""Tokens that single layers' outputs are kept of, at most. On SmolLM2 1024 of them already find the best blocks of 2, 6 and 8
layers that 3072 find."""
