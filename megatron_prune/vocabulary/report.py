"""What a selection keeps, costs and changes: for a person and for a program."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy

from megatron_prune.checkpoint.huggingface import copy_side_files
from megatron_prune.errors import PruneError
from megatron_prune.vocabulary.selection import Selection
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import open_vocabulary

_SHOWN = 20
"""Tokens of either end that are listed."""

_ENOUGH = 0.99
"""Below this share of counted occurrences a warning is due."""


def describe(
    trimmed: Trimmed, selection: Selection | None, counts: numpy.ndarray | None, held_out: Sequence[str]
) -> dict[str, Any]:
    """The report, of plain values.

    Args:
        selection: how the tokens were chosen; ``None`` where a plan names them.
        counts: float64 [rows], occurrences by id, if there are any.
        held_out: texts that were not counted.

    Raises:
        PruneError: if a text whose tokens all stay encodes otherwise than before.
    """
    whole = trimmed.vocabulary
    found: dict[str, Any] = {
        "tokens": {"before": whole.rows, "after": len(trimmed.rows)},
        "must_stay": dict(Counter((selection.must if selection else whole.pinned).values()).most_common()),
        "rows_without_a_token": int(whole.rows - len(whole.pieces)),
        "bytes_without_a_token": [f"{byte:02x}" for byte in whole.main.missing_bytes],
    }
    if counts is not None and counts.sum():
        found["counted"] = {"occurrences": float(counts.sum()), "kept_share": float(counts[trimmed.rows].sum() / counts.sum())}
    if selection:
        found |= _ends(trimmed, selection)
    if held_out:
        found["held_out"] = measure(trimmed, held_out)
    return found


def _ends(trimmed: Trimmed, selection: Selection) -> dict[str, Any]:
    entry = lambda token: {"id": token, "text": trimmed.vocabulary.text(token), "made": float(selection.made[token])}
    kept, free = len(trimmed.rows), len(selection.must)
    last = selection.order[max(free, kept - _SHOWN) : kept][::-1].tolist()
    first = selection.order[kept : kept + _SHOWN].tolist()
    return {"least_frequent_kept": list(map(entry, last)), "most_frequent_dropped": list(map(entry, first))}


def measure(trimmed: Trimmed, texts: Sequence[str]) -> dict[str, Any]:
    """What becomes of texts, by the trimmed tokenizer itself.

    Raises:
        PruneError: if one whose tokens all stay encodes otherwise than before, or another as before.
    """
    whole = trimmed.vocabulary
    with tempfile.TemporaryDirectory() as folder:
        copy_side_files(whole.folder, Path(folder))
        trimmed.write(Path(folder))
        written = open_vocabulary(Path(folder), len(trimmed.rows))
        before, after = whole.encode(texts), written.encode(texts)
    same = [[trimmed.new_ids.get(token) for token in old] == list(new) for old, new in zip(before, after)]
    covered = [all(token in trimmed.new_ids for token in old) for old in before]
    if same != covered:
        text = next(text for text, one, other in zip(texts, same, covered) if one != other)
        raise PruneError(f"the trimmed tokenizer encodes {text[:60]!r} otherwise than the whole one: please report this")
    tokens = [sum(map(len, found)) for found in (before, after)]
    return {
        "texts": len(texts),
        "tokens_before": tokens[0],
        "tokens_after": tokens[1],
        "more_tokens": tokens[1] / max(tokens[0], 1) - 1,
        "same_encoding": sum(same) / len(same),
        "tokens_kept_share": sum(token in trimmed.new_ids for token in chain.from_iterable(before)) / max(tokens[0], 1),
    }


def lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report for a person: (what, value)."""
    before, after = report["tokens"]["before"], report["tokens"]["after"]
    yield "tokens", f"{before:,} → {after:,} ({after / before:.1%})"
    if "parameters" in report:
        saved = report["parameters"]
        yield "parameters", f"{saved['before']:,} → {saved['after']:,} ({saved['after'] / saved['before'] - 1:+.1%})"
        yield "weights saved", f"{saved['bytes_saved'] / 1e6:.1f} MB"
    if "padded" in report:
        yield "rows as stored", f"{report['padded']:,}, padding included"
    yield "must stay", ", ".join(f"{count} {why}" for why, count in report["must_stay"].items())
    if report["bytes_without_a_token"]:
        yield "bytes that no token says", " ".join(report["bytes_without_a_token"]) + " (neither did any before)"
    if "counted" in report:
        share = report["counted"]["kept_share"]
        yield "counted occurrences kept", f"{share:.4%}" + (" — LOW: texts get longer" if share < _ENOUGH else "")
    if "held_out" in report:
        held = report["held_out"]
        yield "held-out texts", f"{held['texts']:,}, {held['same_encoding']:.2%} of them encode as before"
        yield "their tokens", f"{held['tokens_before']:,} → {held['tokens_after']:,} ({held['more_tokens']:+.2%})"
    for key in ("least_frequent_kept", "most_frequent_dropped"):
        if report.get(key):
            shown = ", ".join(f"{entry['text']!r} {entry['made']:.0f}" for entry in report[key][:10])
            yield key.replace("_", " "), shown
