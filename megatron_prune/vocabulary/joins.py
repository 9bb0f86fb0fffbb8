"""Byte-pair encoding of single tokens: how a token is put together, and what it falls into when others are gone.

The *derivation* of a token is the pair that is joined in the last step when the tokenizer's own rules run on that token alone.
It is not the first rule that yields the token: tables converted from tiktoken or SentencePiece list many rules for one product,
and in Llama 3 the first is not the one that fires for 43 % of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterable

import numpy

Rank = Any
"""What says which of two joins comes first: the lower one."""


@dataclass(frozen=True, kw_only=True)
class Joins:
    """The rules of one tokenizer. A piece is a string (or bytes) as the tokenizer's own table spells it.

    Attributes:
        ids: piece → id.
        rank: (left, right) → when they are joined, ``None`` if never.
        symbols: a piece → the pieces that joining starts from.
    """

    ids: dict[Any, int]
    rank: Callable[[Any, Any], Rank | None]
    symbols: Callable[[Any], list[Any]]

    def derivations(self, rows: int) -> Derivations:
        """The derivation of every token; int64 arrays of ``rows`` entries."""
        left, right, length = (numpy.full(rows, fill, dtype=numpy.int64) for fill in (-1, -1, 0))
        for piece, number in self.ids.items():
            symbols = self.symbols(piece)
            length[number] = len(symbols)
            steps: list[tuple[Any, Any]] = []
            if len(symbols) > 1 and self._join(symbols, steps.append) == [piece]:
                left[number], right[number] = (self.ids[part] for part in steps[-1])
        return Derivations(left=left, right=right, length=length)

    def split(self, piece: Any, kept: Callable[[Any], bool]) -> list[Any]:
        """What the rules make of ``piece`` alone where only ``kept`` pieces are left."""
        return self._join(self.symbols(piece), kept=kept)

    def _join(
        self,
        symbols: list[Any],
        note: Callable[[tuple[Any, Any]], None] = lambda pair: None,
        kept: Callable[[Any], bool] = lambda piece: True,
    ) -> list[Any]:
        """Join what can be joined, the lowest rank first, the leftmost of equals; ``symbols`` is used up."""
        ranks = [self._rank(pair, kept) for pair in zip(symbols, symbols[1:])]
        while True:
            best = None
            for place, rank in enumerate(ranks):
                if rank is not None and (best is None or rank < ranks[best]):
                    best = place
            if best is None:
                return symbols
            pair = symbols[best], symbols[best + 1]
            note(pair)
            symbols[best : best + 2] = [pair[0] + pair[1]]
            del ranks[best]
            if best:
                ranks[best - 1] = self._rank((symbols[best - 1], symbols[best]), kept)
            if best < len(ranks):
                ranks[best] = self._rank((symbols[best], symbols[best + 1]), kept)

    def _rank(self, pair: tuple[Any, Any], kept: Callable[[Any], bool]) -> Rank | None:
        rank = self.rank(*pair)
        return rank if rank is not None and kept(pair[0] + pair[1]) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Derivations:
    """How tokens are put together, by id.

    Attributes:
        left, right: int64 [rows], the two parts; -1 where there are none (single symbols, whole words that no rule makes).
        length: int64 [rows], symbols of a token. A part is shorter than the whole, whatever its id.
    """

    left: numpy.ndarray
    right: numpy.ndarray
    length: numpy.ndarray

    @classmethod
    def none(cls, rows: int) -> Derivations:
        """Of a vocabulary whose tokens do not depend on each other (unigram)."""
        return cls(left=numpy.full(rows, -1), right=numpy.full(rows, -1), length=numpy.zeros(rows, dtype=numpy.int64))

    def pushed_down(self, amounts: numpy.ndarray) -> numpy.ndarray:
        """Every token's amount, added to both of its parts, and to theirs.

        Of counts this gives how often a token is made at any step: a part's is at least the whole's, so the tokens of the
        largest sums are closed under taking parts. It orders tokens as leaf-first pruning with frequency propagation does
        (Purason et al. 2025, arXiv 2512.03989).

        Args:
            amounts: float64 or int64 [rows].
        """
        total = amounts.copy()
        made = numpy.flatnonzero(self.left >= 0)
        for length in numpy.unique(self.length[made])[::-1]:
            some = made[self.length[made] == length]
            numpy.add.at(total, self.left[some], total[some])
            numpy.add.at(total, self.right[some], total[some])
        return total

    def closure(self, tokens: Iterable[int]) -> set[int]:
        """The tokens and all parts of theirs."""
        found, waiting = set(), list(tokens)
        while waiting:
            token = waiting.pop()
            if token not in found:
                found.add(token)
                if self.left[token] >= 0:
                    waiting += [int(self.left[token]), int(self.right[token])]
        return found
