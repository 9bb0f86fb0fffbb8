"""Data sets of the ``datasets`` library, served from memory with the columns they have on the hub."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from random_words import words

from megatron_prune.errors import InputError
from megatron_prune.text.readers import c4
from megatron_prune.text.windows import draw_windows, read_windows


def published(tokens: torch.Tensor, length: int, count: int, seed: int) -> torch.Tensor:
    """GPTQ's loop."""
    random.seed(seed)
    rows = []
    for _ in range(count):
        start = random.randint(0, len(tokens) - length - 1)
        rows.append(tokens[start : start + length])
    return torch.stack(rows)


def test_wikitext2_calibrates_on_train_and_measures_on_test(served, load, ids, folder):
    train, test = ["", words(90, 1), " = Title = \n", words(90, 2)], ["", words(40, 3), "", words(40, 4)]
    calls = served({"Salesforce/wikitext": {"train": {"text": train}, "test": {"text": test}}})
    found = load("wikitext2:1", nsamples=6, seed=11)
    assert torch.equal(found.tokens, published(ids(" ".join(train)), 8, 6, 11))
    assert found.provenance[0]["dataset"] == "Salesforce/wikitext" and found.provenance[0]["split"] == "train"
    drawn = draw_windows("wikitext2", folder, seq_length=8, count=5)
    assert torch.equal(drawn.tokens, ids("\n\n".join(test))[:40].view(5, 8))
    assert drawn.facts["split"] == "test"
    assert [call[0] for call in calls] == [("Salesforce/wikitext", "wikitext-2-raw-v1")] * 2


def test_ptb_reads_sentences(served, load, ids, folder):
    train, test = [words(20, n) for n in range(9)], [words(20, n) for n in range(20, 24)]
    calls = served({"ptb-text-only/ptb_text_only": {"train": {"sentence": train}, "test": {"sentence": test}}})
    assert torch.equal(load("ptb:1").tokens, published(ids(" ".join(train)), 8, 4, 0))
    assert torch.equal(read_windows("ptb", folder, seq_length=8, count=1), ids(" ".join(test))[None, :8])
    assert calls[0][1]["revision"] == "refs/convert/parquet"


def test_the_layout_of_the_hubs_parquet_copies_is_what_datasets_reads(tmp_path):
    import datasets

    for split in ("train", "test", "validation"):
        place = tmp_path / "penn_treebank" / split
        place.mkdir(parents=True)
        datasets.Dataset.from_dict({"sentence": [split]}).to_parquet(place / "0000.parquet")
    for split in ("train", "test", "validation"):
        assert list(datasets.load_dataset(str(tmp_path), data_dir="penn_treebank", split=split)["sentence"]) == [split]


def test_c4_draws_documents_until_one_is_long_enough(served, load, ids, folder):
    documents = [words(1 + 7 * (n % 5), n) for n in range(40)]
    calls = served({"allenai/c4": {"train": {"text": documents}, "validation": {"text": [words(9, n) for n in range(5)]}}})
    found = load("c4:1", nsamples=5, seq_length=40, seed=2)
    random.seed(2)
    for row in found.tokens:
        while True:
            tokens = ids(documents[random.randint(0, len(documents) - 1)])
            if len(tokens) > 40:
                break
        start = random.randint(0, len(tokens) - 40 - 1)
        assert torch.equal(row, tokens[start : start + 40])
    assert calls[0][1]["data_files"]["train"] == "en/c4-train.00000-of-01024.json.gz"
    drawn = draw_windows("c4", folder, seq_length=8, count=2)
    assert drawn.facts["split"] == "validation"
    assert torch.equal(drawn.tokens, ids(" ".join(words(9, n) for n in range(5)))[:16].view(2, 8))


def test_c4_gives_up_after_a_while(served, load, monkeypatch):
    monkeypatch.setattr(c4, "TRIES", 50)
    served({"allenai/c4": {"train": {"text": ["short"] * 3}}})
    with pytest.raises(InputError, match="(?s)long enough, in 50 draws.*got: at most [1-9].*more than 60.*--seq-length"):
        load("c4:1", seq_length=60)


QUESTIONS = {
    "mmlu": (
        "cais/mmlu",
        "auxiliary_train",
        "test",
        lambda n: {"question": f"Why {n}?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": ""},
        lambda n: f"Question: Why {n}?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
    ),
    "hellaswag": (
        "Rowan/hellaswag",
        "train",
        "validation",
        lambda n: {"activity_label": "Run", "ctx": f"He {n}", "endings": ["x", "y", "z", "w"], "label": "1"},
        lambda n: f"Activity: Run\nContext: He {n}\nWhat happens next?\n1. x\n2. y\n3. z\n4. w\nAnswer:",
    ),
    "winogrande": (
        "allenai/winogrande",
        "train",
        "validation",
        lambda n: {"sentence": f"The _ {n}", "option1": "cat", "option2": "dog", "answer": "1"},
        lambda n: f"Fill in the blank:\nThe _ {n}\n1. cat\n2. dog\nAnswer:",
    ),
    "arc_easy": (
        "allenai/ai2_arc",
        "train",
        "test",
        lambda n: {"question": f"Why {n}?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "1"},
        lambda n: f"Question: Why {n}?\n1. a\n2. b\n3. c\nAnswer:",
    ),
}
QUESTIONS["arc_challenge"] = QUESTIONS["arc_easy"]


def table(row, start: int, stop: int) -> dict:
    rows = [row(n) for n in range(start, stop)]
    return {column: [each[column] for each in rows] for column in rows[0]}


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_questions_are_samples_of_their_own(served, load, ids, folder, name):
    place, train, test, row, prompt = QUESTIONS[name]
    calls = served({place: {train: table(row, 0, 20), test: table(row, 100, 110)}})
    found = load(f"{name}:1", nsamples=6, seq_length=64, seed=4)
    random.seed(4)
    chosen = random.sample(range(20), 6)
    for sample, length, number in zip(found.tokens, found.lengths, chosen):
        expected = ids(prompt(number))[:64]
        assert length == len(expected)
        assert torch.equal(sample[:length], expected) and not sample[length:].any()
    assert found.provenance[0]["split"] == train
    cut = load(f"{name}:1", nsamples=6, seq_length=12, seed=4)
    assert cut.lengths.tolist() == [12] * 6 and torch.equal(cut.tokens, found.tokens[:, :12])
    drawn = draw_windows(name, folder, seq_length=16, count=3)
    assert drawn.facts["split"] == test != train
    assert torch.equal(drawn.tokens, ids("\n\n".join(prompt(n) for n in range(100, 110)))[:48].view(3, 16))
    if "arc" in name:
        assert calls[0][0][1] == {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}[name]
    with pytest.raises(InputError, match="(?s)fewer questions.*got: 20.*needed: 21"):
        load(f"{name}:1", nsamples=21)


def test_a_row_that_is_not_as_expected_is_named(served, load):
    served({"cais/mmlu": {"auxiliary_train": {"question": ["a"], "choices": [[str(n) for n in range(11)]]}}})
    with pytest.raises(InputError, match="(?s)row of mmlu.*11 choices"):
        load("mmlu:1", nsamples=1)
    served({"cais/mmlu": {"auxiliary_train": {"question": ["a"]}}})
    with pytest.raises(InputError, match="no column 'choices'"):
        load("mmlu:1", nsamples=1)


def test_any_hub_data_set_is_joined_with_blank_lines(served, load, ids, folder):
    train, valid = [words(50, 1), words(50, 2)], [words(50, 3)]
    calls = served({"me/mine": {"train": {"body": train}, "validation": {"body": valid}}, "me/one": {"train": {"body": train}}})
    found = load("me/mine/part:1", field="body")
    tokens = ids("\n\n".join(train))
    starts = torch.randint(0, len(tokens) - 8, (4,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.tokens, torch.stack([tokens[s : s + 8] for s in starts]))
    assert calls[0][0] == ("me/mine", "part")
    assert found.provenance[0]["name"] == "me/mine/part" and found.provenance[0]["config"] == "part"
    drawn = draw_windows("me/mine", folder, seq_length=8, count=2, field="body")
    assert drawn.facts["split"] == "validation"
    assert torch.equal(drawn.tokens, ids(valid[0])[:16].view(2, 8))
    assert load("me/mine:1", field="body", split="validation").provenance[0]["split"] == "validation"
    with pytest.raises(InputError, match="(?s)nothing to evaluate on.*splits train.*test or validation"):
        read_windows("me/one", folder, seq_length=8, count=2, field="body")
    with pytest.raises(InputError, match="(?s)no column 'text'.*columns body"):
        load("me/mine:1")
    with pytest.raises(InputError, match="(?s)cannot load me/mine.*Unknown split"):
        load("me/mine:1", field="body", split="dev")
    with pytest.raises(
        InputError, match="(?s)cannot load me/none.*DatasetNotFoundError: Dataset 'me/none' doesn't exist on the Hub.\n"
    ):
        load("me/none:1")


def test_columns_without_text_are_refused(served, load):
    served({"me/numbers": {"train": {"text": [1, 2]}}, "me/holes": {"train": {"text": ["a", None]}}})
    with pytest.raises(InputError, match="(?s)me/numbers, row 1 has no text in field 'text'.*int"):
        load("me/numbers:1")
    with pytest.raises(InputError, match="(?s)me/holes, row 2 has no text in field 'text'.*NoneType"):
        load("me/holes:1")


def test_without_the_library_it_says_what_to_install(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="(?s)not installed.*pip install datasets"):
        load("wikitext2:1")
