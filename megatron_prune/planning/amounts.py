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
