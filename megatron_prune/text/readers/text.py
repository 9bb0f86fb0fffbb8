"""A text file, tokenised whole; windows start where the quality protocol's draw says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron_prune.text.documents import LONGEST, Document, FileReader, plain_documents, within_memory
from megatron_prune.text.reader import READERS
from megatron_prune.text.streams import text_blocks


@READERS.register(".txt")
class TextFile(FileReader):
    """UTF-8 text, as it stands. Files with endings nobody knows are read as text too."""

    def text(self) -> tuple[str, dict[str, Any]]:
        return "".join(within_memory(self.name, self._blocks())), {"split": None}

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        return plain_documents(self, self._blocks(), keys)

    def _blocks(self) -> Iterator[str]:
        return text_blocks(Path(self.name), LONGEST)
