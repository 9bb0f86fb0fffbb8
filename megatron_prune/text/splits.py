"""What a split of a data set is for."""

from __future__ import annotations

TRAIN, TEST = "train", "test"
"""The two purposes a split is named for; a data set has its own names for them (``Reader.split_name``)."""
