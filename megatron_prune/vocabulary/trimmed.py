"""A vocabulary without the rest: all files of its tokenizer, and everything else that names ids."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_prune.errors import PlanError, PruneError
from megatron_prune.vocabulary import id_fields
from megatron_prune.vocabulary.id_map import MAP_FILE, IdMap
from megatron_prune.vocabulary.vocabulary import Vocabulary, open_vocabulary

_OTHER_FORMS = (
    *("tekken.json", "tokenizer.model*", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tiktoken.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "vocab.bpe", "encoder.json", "dict.txt"),
)
"""Files that may say the old vocabulary: those that are not written anew are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trimmed:
    """Attributes:
    vocabulary: the whole one.
    rows: int64 [kept], ids that stay, ascending.
    """

    vocabulary: Vocabulary
    rows: numpy.ndarray

    @functools.cached_property
    def new_ids(self) -> dict[int, int]:
        """Old id → new id of what stays."""
        return {old: new for new, old in enumerate(self.rows.tolist())}

    @functools.cached_property
    def id_map(self) -> IdMap:
        """What renumbers tokenised data."""
        return IdMap.of(self.vocabulary, self.rows)

    def check(self, where: object) -> None:
        """Refuse rows without what must stay, or that leave a token out of reach.

        Raises:
            PlanError: naming tokens.
        """
        kept = set(self.rows.tolist())
        must = self.vocabulary.pinned
        absent = [f"{token} {self.vocabulary.text(token)!r} ({must[token]})" for token in sorted(set(must) - kept)]
        parts = self.vocabulary.derivations.closure(kept) - kept - set(must)
        absent += [f"{token} {self.vocabulary.text(token)!r} (part of one that stays)" for token in sorted(parts)]
        if absent:
            shown = ", ".join(absent[:8]) + (" …" if len(absent) > 8 else "")
            raise PlanError(f"{where} drops {len(absent)} tokens that must stay", got=shown, do="add them to its vocab")

    def config(self, data: dict[str, Any]) -> dict[str, Any]:
        """``config.json`` with new ids; the size of the vocabulary is the model's to say."""
        return id_fields.renumber_config(data, self.new_ids)

    def write(self, folder: Path) -> None:
        """Write the tokenizer into ``folder``, over the copies of the old files, and check what was written.

        Raises:
            PruneError: if the result does not say the tokens that stay.
        """
        source = self.vocabulary.folder
        if len(self.rows) < self.vocabulary.rows:  # the whole vocabulary keeps its files byte for byte
            for pattern in _OTHER_FORMS:
                for file in folder.glob(pattern):
                    file.unlink()
            for file in self.vocabulary.files:
                file.write(folder, self.new_ids)
            id_fields.renumber_files(source, folder, self.new_ids, len(self.rows))
        (folder / MAP_FILE).write_bytes(self.id_map.dumps())
        written = open_vocabulary(folder, len(self.rows))
        moved = {self.new_ids[old]: piece for old, piece in self.vocabulary.pieces.items() if old in self.new_ids}
        if written.pieces != moved:
            raise PruneError(f"the trimmed tokenizer in {folder} does not say what was kept: please report this")
