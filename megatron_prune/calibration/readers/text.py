"""A text file, tokenised whole; windows start where the quality protocol's draw says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.calibration.reader import READERS, TextReader
from megatron_prune.errors import InputError


@READERS.register(".txt")
class TextFile(TextReader):
    """UTF-8 text, as it stands. Files with endings nobody knows are read as text too."""

    def text(self) -> tuple[str, dict[str, Any]]:
        return read_text(Path(self.name)), {"split": None}


def read_text(file: Path) -> str:
    """The text of a file, line ends as Python reads them.

    Raises:
        InputError: if it cannot be read or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as text", got=str(error), needed="a UTF-8 text file") from None
