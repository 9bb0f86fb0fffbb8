"""Derivations, scores and sizes, against the runtime and against recursion."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import OTHER, text

from megatron_prune.errors import InputError
from megatron_prune.vocabulary.counting import count_texts
from megatron_prune.vocabulary.selection import Wanted, select, tokens_of_scripts, tokens_of_texts
from megatron_prune.vocabulary.vocabulary import open_vocabulary

BPE = ["byte_level", "byte_level_words", "json_and_ranks", "llama2", "rank_file", "sentencepiece_bpe", "gpt2_files"]


@pytest.fixture(scope="module")
def counted(opened):
    """``counted(kind)`` → (vocabulary, its own count of a text)."""

    def get(kind: str):
        whole = opened(kind)
        table = numpy.zeros(whole.rows)
        for found in whole.encode(text().splitlines()):
            for token in found:
                table[token] += 1
        return whole, table

    return get


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_words", "llama2", "gpt2_files"])
def test_without_a_token_the_runtime_makes_it_of_its_derivation(opened, kind):
    """The independent side: tokenizers itself, with the rules of one token taken out."""
    import json

    from tokenizers import Tokenizer

    whole = opened(kind)
    model = json.loads(whole.main.runtime().to_str())["model"] if kind != "gpt2_files" else whole.main._tables._model
    vocab = {number: piece for piece, number in model["vocab"].items()}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made_tokens = numpy.flatnonzero(whole.derivations.left >= 0)
    assert len(made_tokens) > 300
    for token in made_tokens[:: max(1, len(made_tokens) // 40)].tolist():
        piece = vocab[token]
        rules = [pair for pair in merges if "".join(pair) != piece]
        lacking = {"type": "BPE", "vocab": model["vocab"], "merges": rules, "byte_fallback": False, "ignore_merges": False}
        left = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": lacking})).encode(piece).ids
        assert left == [whole.derivations.left[token], whole.derivations.right[token]], piece


def test_a_token_that_no_rule_makes_has_no_derivation(opened):
    whole = opened("byte_level")
    single = {token for token, piece in whole.main.pieces.items() if len(piece) == 1}
    assert all(whole.derivations.left[token] == -1 for token in {*single, *whole.added})


@pytest.mark.parametrize("kind", BPE)
def test_made_counts_every_step_of_every_token(counted, kind):
    whole, table = counted(kind)
    parts = {t: (int(a), int(b)) for t, (a, b) in enumerate(zip(whole.derivations.left, whole.derivations.right)) if a >= 0}
    made: Counter[int] = Counter()

    def add(token: int, times: float) -> None:
        made[token] += times
        for part in parts.get(token, ()):
            add(part, times)

    for token, times in enumerate(table.tolist()):
        add(token, times)
    found = select(whole, table, Wanted(size=whole.rows)).made
    assert found.tolist() == [made[token] for token in range(whole.rows)]


@pytest.mark.parametrize("kind", [*BPE, "unigram_json", "sentencepiece_unigram"])
@given(data=st.data())
def test_any_size_is_exact_closed_nested_and_holds_what_must_stay(opened, kind, data):
    whole = opened(kind)
    counts = count_texts([text()[: data.draw(st.integers(1, 5000))]], whole).astype(float)
    prior = data.draw(st.sampled_from([0.0, 0.02, 1.0]))
    sizes = sorted(data.draw(st.lists(st.integers(len(whole.pinned), whole.rows), min_size=2, max_size=2)))
    small, large = (set(select(whole, counts, Wanted(size=size, prior=prior)).rows.tolist()) for size in sizes)
    assert [len(small), len(large)] == sizes and small <= large
    for kept in (small, large):
        assert whole.derivations.closure(kept) == kept
        assert set(whole.pinned) <= kept


def test_dropping_the_next_token_costs_what_it_was_made(counted):
    """To first order: each occurrence becomes the two parts."""
    whole, table = counted("byte_level_words")
    order = select(whole, table, Wanted(size=whole.rows, prior=0.0))
    last = int(order.order[-1])
    from megatron_prune.vocabulary.id_map import IdMap

    rows = numpy.array(sorted(set(range(whole.rows)) - {last}))
    tokens = numpy.repeat(numpy.arange(whole.rows), table.astype(int))
    found, _ = IdMap.of(whole, rows).apply(tokens)
    assert len(found) - len(tokens) == table[last]


def test_coverage_and_min_count(counted):
    whole, table = counted("byte_level")
    for share in (0.5, 0.9, 0.999, 1.0):
        found = select(whole, table, Wanted(coverage=share))
        kept = table[found.rows].sum() / table.sum()
        assert kept >= share - 1e-12
        if len(found.rows) > len(whole.pinned):
            fewer = select(whole, table, Wanted(size=len(found.rows) - 1)).rows
            assert table[fewer].sum() / table.sum() < share
    for least, prior in ((1, 0.0), (5, 0.02), (20, 0.5)):
        found = select(whole, table, Wanted(min_count=least, prior=prior))
        assert set(found.rows.tolist()) == set(whole.pinned) | set(numpy.flatnonzero(found.made >= least).tolist())


def test_sizes_are_rounded_up_with_tokens_and_never_above_all(counted):
    whole, table = counted("byte_level")
    assert len(select(whole, table, Wanted(size=401, multiple_of=64)).rows) == 448
    assert len(select(whole, table, Wanted(size=690, multiple_of=512)).rows) == 700


def test_rows_without_a_token_go_first(made):
    whole = open_vocabulary(made("byte_level"), 720)
    order = select(whole, None, Wanted(size=720)).order
    assert sorted(order[-20:].tolist()) == list(range(700, 720))


def test_texts_and_scripts_that_are_to_stay(opened):
    whole = opened("llama2")
    kept = tokens_of_texts(whole, ["naïve café", "Boxkämpfer"])
    assert {token for form in ("naïve café", " naïve café") for token in whole.encode([form])[0]} <= kept
    latin, cyrillic = tokens_of_scripts(whole, ["Latin"]), tokens_of_scripts(whole, ["Cyrillic"])
    said = lambda tokens: {whole.text(token) for token in tokens}
    assert latin and cyrillic and not latin & cyrillic
    assert all(any("a" <= letter.lower() <= "z" or letter in "ïéäöüłß" for letter in word) for word in said(latin))
    assert all(any("а" <= letter.lower() <= "ё" for letter in word) for word in said(cyrillic))
    assert tokens_of_scripts(whole, ["Latin", "Cyrillic"]) >= latin | cyrillic
    found = select(whole, None, Wanted(keep=dict.fromkeys(cyrillic, "script")))
    assert set(found.rows.tolist()) == whole.derivations.closure({*whole.pinned, *cyrillic})


@pytest.mark.parametrize("names", [[], ["Latin}|a"], [""]])
def test_names_that_are_none(opened, names):
    with pytest.raises(InputError, match="Unicode scripts"):
        tokens_of_scripts(opened("byte_level"), names)


@pytest.mark.parametrize("name, near", [("Lattin", "Latin"), ("Cyrilic", "Cyrillic")])
def test_an_unknown_script_is_answered_with_the_nearest(opened, name, near):
    with pytest.raises(InputError, match=f"did you mean {near}"):
        tokens_of_scripts(opened("byte_level"), [name])


@pytest.mark.parametrize("kind", BPE)
def test_a_dropped_token_splits_into_what_the_trimmed_runtime_makes_of_it(cut, kind):
    whole, trimmed, written = cut(kind, 0.2)
    starts, pieces = trimmed.id_map.starts, trimmed.id_map.pieces
    dropped = [token for token in whole.main.pieces if token not in trimmed.new_ids]
    assert len(dropped) > 50
    for token in dropped:
        new = pieces[starts[token] : starts[token + 1]].tolist()
        said = b"".join(written.pieces[part] for part in new)
        if b"<0x" in said:
            said = written.main.decode([written.main.joins.ids["a"], *new])[1:].encode()
            assert said == whole.pieces[token].replace("▁".encode(), b" ")
        else:
            assert said == whole.pieces[token]
        if hasattr(written.main, "runtime"):
            spelled = whole.main.runtime().id_to_token(token)
            assert [part.id for part in written.main.runtime().model.tokenize(spelled)] == new


def test_what_is_counted_is_what_the_tokenizer_says(counted):
    for kind in ("byte_level", "sentencepiece_bpe", "rank_file", "gpt2_files"):
        whole, table = counted(kind)
        lines = text().splitlines()
        assert (count_texts(lines, whole) == table).all()
    assert OTHER.strip() in lines
