"""Which tokens stay: the highest scores, among sets that leave every kept token reachable."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, Iterable, Sequence

import numpy
import regex

from megatron_prune.errors import InputError
from megatron_prune.serving.nearest import nearest_counts
from megatron_prune.vocabulary.vocabulary import Vocabulary

PRIOR = 0.02
"""Default weight of the prior: it costs 0.001 of a text's length in domain and repairs the tail outside (``docs/vocabulary.md``)."""

_PRIOR_OFFSET = 100


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for; one of size, min_count and coverage, or none: then only what is named stays.

    Attributes:
        size: tokens that stay, in all.
        min_count: tokens made at least this often stay.
        coverage: the share of occurrences whose token stays, at least.
        multiple_of: the size is rounded up to a multiple of this, filled with tokens.
        prior: weight of the prior against the counts, 0 to 1.
        keep: further ids that stay → why.
        unserved: what of a vocabulary of so many tokens cannot be served as was asked, in words.
        period: number of tokens after which that repeats.
    """

    size: int | None = None
    min_count: float | None = None
    coverage: float | None = None
    multiple_of: int = 1
    prior: float = PRIOR
    keep: dict[int, str] = field(default_factory=dict)
    unserved: Callable[[int], list[str]] = lambda tokens: []
    period: int = 1

    def check_served(self, size: int, least: int, most: int) -> None:
        """Refuse a size that cannot be served.

        Args:
            least, most: the sizes that there could be.

        Raises:
            InputError: naming the nearest that can.
        """
        if problems := self.unserved(size):
            near = nearest_counts(size, range(least, most + 1), self.unserved, self.period)
            needed = f"{' or '.join(map(str, near))} (the nearest)" if near else None
            do = None if near else "ask less of --serve"
            raise InputError(f"--serve: {size} tokens cannot be served so", got="; ".join(problems), needed=needed, do=do)


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Attributes:
    rows: int64 [kept], ids that stay, ascending.
    order: int64 [rows], all ids, those that must stay first, then by falling score.
    must: id → why it must stay.
    made: float64 [rows], how often every token is made at any step of encoding (all zero without counts).
    """

    rows: numpy.ndarray
    order: numpy.ndarray
    must: dict[int, str]
    made: numpy.ndarray


def select(vocabulary: Vocabulary, counts: numpy.ndarray | None, wanted: Wanted) -> Selection:
    """Choose tokens.

    The score of a token is ``(1 - L) · made / occurrences + L · prior``: how often it is made at any step of encoding the
    corpus, and 1 / (id + 100) pushed down the same derivations, since what a tokenizer learnt early is what texts of all
    kinds need. Both are at least as large for a part as for the whole, so tokens in this order (of equals the shorter first)
    are closed at any size, and dropping the last costs as many further tokens as it was made.

    Args:
        counts: float64 [rows], occurrences by id; ``None``: the prior alone decides.

    Raises:
        InputError: if fewer tokens are asked for than must stay, or more than there are, or a number that cannot be served.
    """
    ids = vocabulary.derivations
    prior = 1.0 / (numpy.arange(vocabulary.rows) + _PRIOR_OFFSET) * vocabulary.ids_of_rows()
    score = ids.pushed_down(prior / prior.sum())
    made = numpy.zeros(vocabulary.rows)
    occurrences = 0.0 if counts is None else float(counts.sum())
    if occurrences:
        made = ids.pushed_down(counts)
        score = (1.0 - wanted.prior) * made / occurrences + wanted.prior * score
    must = vocabulary.pinned | {token: why for token, why in wanted.keep.items() if token not in vocabulary.pinned}
    must |= dict.fromkeys(ids.closure(must) - set(must), "part of one that stays")
    enough = made >= (wanted.min_count or 0.0)  # closed as well, so it may come first
    last = numpy.lexsort((numpy.arange(vocabulary.rows), ids.length, -score, ~enough, ~vocabulary.ids_of_rows()))
    is_must = numpy.zeros(vocabulary.rows, dtype=bool)
    is_must[list(must)] = True
    order = numpy.concatenate([numpy.flatnonzero(is_must), last[~is_must[last]]])
    size = _size(vocabulary, wanted, must, order, made, counts)
    return Selection(rows=numpy.sort(order[:size]), order=order, must=must, made=made)


def _size(
    vocabulary: Vocabulary,
    wanted: Wanted,
    must: dict[int, str],
    order: numpy.ndarray,
    made: numpy.ndarray,
    counts: numpy.ndarray | None,
) -> int:
    if wanted.size is not None:
        size = wanted.size
        if size > vocabulary.rows:
            raise InputError(f"a vocabulary of {size}", got=f"a model of {vocabulary.rows} rows", needed="no more than those")
        if size < len(must):
            reasons = ", ".join(f"{count} {why}" for why, count in Counter(must.values()).most_common())
            raise InputError(
                f"a vocabulary of {size} has no room for the tokens that must stay",
                got=f"{len(must)} of them: {reasons}",
                needed=f"at least {len(must)}",
            )
    elif wanted.min_count is not None:
        size = len(must) + int((made[order[len(must) :]] >= wanted.min_count).sum())
    elif wanted.coverage is not None:
        covered = numpy.cumsum(counts[order]) / max(counts.sum(), 1.0)
        enough = numpy.flatnonzero(covered >= wanted.coverage - 1e-12)
        size = max(len(must), int(enough[0]) + 1)
    else:
        size = len(must)
    step = wanted.multiple_of
    rounded = min(-(-size // step) * step, vocabulary.rows)
    if wanted.size is None or step > 1:  # it may become larger
        able = range(rounded, min(rounded + wanted.period * step, vocabulary.rows) + 1, step)
        rounded = next((count for count in able if not wanted.unserved(count)), rounded)
    wanted.check_served(rounded, len(must), vocabulary.rows)
    return rounded


def tokens_of_texts(vocabulary: Vocabulary, texts: Iterable[str]) -> set[int]:
    """Every token that the texts encode to, as they are and behind a space."""
    forms = [form for text in texts for form in (text, f" {text}")]
    return {token for found in vocabulary.encode(forms) for token in found}


def tokens_of_scripts(vocabulary: Vocabulary, scripts: Sequence[str]) -> set[int]:
    """Tokens with letters of these Unicode scripts and of no other. Parts of characters are left to what needs them.

    Raises:
        InputError: if there is no such script.
    """
    if not scripts:
        raise InputError("--keep-script names none", needed="names of Unicode scripts, such as " + ", ".join(_SCRIPTS[:8]))
    for name in scripts:
        if name not in _SCRIPTS:
            near = difflib.get_close_matches(name.capitalize(), _SCRIPTS, n=1)
            try:
                regex.compile(rf"\p{{Script={name}}}" if regex.fullmatch(r"\w+", name) else "(")
            except regex.error:
                raise InputError(
                    f"unknown script {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
                    needed="names of Unicode scripts, such as " + ", ".join(_SCRIPTS[:8]),
                ) from None
    own = "".join(rf"\p{{Script={name}}}" for name in scripts)
    wanted, other = regex.compile(f"[{own}]"), regex.compile(rf"[\p{{L}}--[{own}\p{{Common}}\p{{Inherited}}]]", regex.V1)
    found = set()
    for token, piece in vocabulary.pieces.items():
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if wanted.search(text) and not other.search(text):
            found.add(token)
    return found


_SCRIPTS = (
    *("Latin", "Han", "Cyrillic", "Arabic", "Devanagari", "Hiragana", "Katakana", "Hangul", "Greek", "Hebrew", "Thai"),
    *("Bengali", "Tamil", "Telugu", "Georgian", "Armenian", "Ethiopic", "Khmer", "Lao", "Myanmar", "Sinhala", "Tibetan"),
)
"""The commonest, for messages; all that Unicode knows are taken."""
