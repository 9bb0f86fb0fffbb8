"""Talks as text by templates, and which of their tokens are answers: against transformers' own renderings and masks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy
import pytest
import torch
from test_files import protocol

from megatron_prune.cli.main import main
from megatron_prune.errors import InputError
from megatron_prune.runtime.chat_template import TemplateError
from megatron_prune.runtime.world import World
from megatron_prune.steps.preprocess import PreprocessOptions, preprocess
from megatron_prune.text import template as module
from megatron_prune.text.answers import mask_prefix, open_mask
from megatron_prune.text.documents import open_documents
from megatron_prune.text.encoder import Encoder
from megatron_prune.text.pair import open_pair
from megatron_prune.text.talks import answer_spans

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].strip() + '</a>\n' }}{% else %}<u>{{ m.content }}</u>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
OPENED = THINKING.replace("{% if add_generation_prompt %}<a>", "{% if add_generation_prompt %}<a><think>\n")
FORGETFUL = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}\n{% endif %}{% endfor %}"

ASK, SAY, MORE, LAST = "What is a hen?", "<think>It flies.</think>\nA bird — Zwölf 漢.", "And  more?", " no "
TALK = [
    {"role": "user", "content": ASK},
    {"role": "assistant", "content": SAY},
    {"role": "user", "content": MORE},
    {"role": "assistant", "content": LAST},
]


@pytest.fixture(scope="module")
def templated(tokenizer, tmp_path_factory):
    """``templated(template)`` → (directory of the tiny tokenizer with it, that tokenizer), made once."""
    from transformers import AutoTokenizer

    made: dict[str, tuple[Path, object]] = {}

    def get(template: str):
        if template not in made:
            folder = tmp_path_factory.mktemp("chat") / "hf"
            tokenizer.save_pretrained(folder)
            (folder / "chat_template.jinja").write_text(template)
            made[template] = folder, AutoTokenizer.from_pretrained(folder)
        return made[template]

    return get


def write(file: Path, *records: dict) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def rendered(folder: Path, *messages: dict, **beside) -> tuple[str, list[str]]:
    """A talk as text, and its answers."""
    text, spans = Encoder(folder, answers=True).render(list(messages), beside.get("tools"), "x, line 1")
    return text, [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    "template, answers",
    [
        (CHATML, [SAY + "<|im_end|>", LAST + "<|im_end|>"]),
        (BRACKETS, [f" {SAY}</s>", " no</s>"]),
        (MARKED, [SAY + "</s>", LAST + "</s>"]),
        (THINKING, ["A bird — Zwölf 漢.</a>", "<think>\n\n</think>\n\nno</a>"]),
        (OPENED, ["A bird — Zwölf 漢.</a>", "\n</think>\n\nno</a>"]),
    ],
    ids=["prompt", "none", "marked", "thinking", "opened"],
)
def test_a_talk_is_what_transformers_makes_of_it_and_its_answers_are_told(templated, template, answers):
    folder, tokenizer = templated(template)
    text, found = rendered(folder, *TALK)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert found == answers


def test_a_template_that_says_answers_otherwise_later_is_refused():
    def render(messages, prompt):
        return "".join(f"{number} of {len(messages)}: {each['content']}\n" for number, each in enumerate(messages))

    with pytest.raises(TemplateError, match=r"message 2 otherwise when more follows.*\{% generation %\}"):
        answer_spans(render, TALK, render(TALK, False))


def test_talks_of_every_writing_are_the_same(templated, tmp_path):
    import pyarrow
    from pyarrow import parquet

    folder, tokenizer = templated(MARKED)
    sharegpt = [{"from": who, "value": each["content"]} for who, each in zip(("human", "gpt", "human", "gpt"), TALK)]
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in TALK]
    rows = [{"messages": TALK}, {"conversations": sharegpt}, {"messages": parts, "id": 5}, {"system": "Be.", "messages": TALK}]
    wanted = tokenizer.apply_chat_template(TALK, tokenize=False)
    write(tmp_path / "x.jsonl", *rows)
    parquet.write_table(pyarrow.table({"messages": [TALK] * 2, "id": [1, 2]}), tmp_path / "x.parquet")
    said = lambda name, key="text": [
        document.texts[0]
        for document in open_documents(str(tmp_path / name), (key,), split="train", encode=Encoder(folder)).documents((key,))
    ]
    assert said("x.jsonl") == [wanted, wanted, wanted, "system: Be.\n" + wanted]
    assert said("x.parquet") == said("x.parquet", "messages") == [wanted, wanted]


def test_data_sets_of_talks_are_read(templated, load, served, tmp_path):
    import datasets

    folder, tokenizer = templated(MARKED)
    rows = {"prompt_id": ["1", "2"], "messages": [TALK, TALK[:2]]}
    served({"me/chat": {"train": rows}})
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    text = "".join(tokenizer.apply_chat_template(talk, tokenize=False) for talk in rows["messages"])
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    for name in ("me/chat", str(tmp_path / "saved")):
        assert torch.equal(load(f"{name}:1", tokenizer_dir=folder).tokens, protocol(tokens, 8, 4, 0))


def test_talks_are_calibration_data_without_a_second_bos(templated, load, tmp_path):
    folder, tokenizer = templated(BRACKETS)
    write(tmp_path / "x.jsonl", *[{"messages": TALK}] * 5)
    text = tokenizer.apply_chat_template(TALK, tokenize=False) * 5
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = load(f"{tmp_path}/x.jsonl:1", tokenizer_dir=folder)
    assert torch.equal(found.tokens, protocol(tokens, 8, 4, 0)) and found.provenance[0]["documents"] == 5


@pytest.mark.parametrize(
    "template, record, message",
    [
        (
            BRACKETS,
            {"messages": [{"role": "system", "content": "s"}, *TALK]},
            "x.jsonl, line 2: the chat template.*Only user and assistant",
        ),
        (
            FORGETFUL,
            {"messages": [{"role": "system", "content": "forget me"}, *TALK]},
            "line 2: .*it leaves out message 1, of role system",
        ),
        (CHATML, {"messages": [{"role": "user"}]}, "line 2, message 1: content.*got: None.*needed: text"),
        (CHATML, {"messages": [{"content": "a"}]}, "line 2, message 1: role"),
        (CHATML, {"messages": ["a"]}, "line 2, message 1.*got: 'a'"),
        (CHATML, {"messages": []}, "line 2 holds a talk without messages"),
        (CHATML, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: content.*image.*parts of text"),
        (CHATML, {"messages": TALK, "tools": "none"}, "line 2: tools.*'none'"),
        (CHATML, {"messages": 5}, "line 2 has no text in field 'text'.*fields messages"),
        ("{{ messages[0].content.__class__.__mro__ }}", {"messages": TALK}, "line 2: the chat template of hf does not do"),
        ("{{", {"messages": TALK}, "line 2: the chat template of hf does not do"),
    ],
)
def test_talks_and_templates_that_do_not_do_are_named(templated, tmp_path, template, record, message):
    file = write(tmp_path / "x.jsonl", {"text": "plain"}, record)
    with pytest.raises(InputError, match=f"(?s){message}"):
        list(open_documents(str(file), ("text",), split="train", encode=Encoder(templated(template)[0])).documents(("text",)))


def test_without_a_template_it_says_what_to_do(folder, tmp_path):
    file = write(tmp_path / "x.jsonl", {"messages": TALK})
    for encode, message in ((Encoder(folder), "has no chat template.*chat_template.jinja"), (Encoder(None), "name a tokenizer")):
        with pytest.raises(InputError, match=f"(?s)x.jsonl, line 1 is a talk.*{message}"):
            list(open_documents(str(file), ("text",), split="train", encode=encode).documents(("text",)))


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end.*within 1 s"),
        ("{{ 10 ** 1000000000 }}", "did not end"),
        ("{{ 'a' * 200000000000 }}", "too much memory"),
    ],
)
def test_a_template_takes_no_more_time_or_memory_than_it_may(templated, monkeypatch, template, message):
    if message != "too much memory":
        monkeypatch.setattr(module, "SECONDS", 1)
    chat = module.ChatTemplate(templated(template)[1], "hf", answers=False)
    with pytest.raises(InputError, match=f"(?s)x, line 1: the chat template of hf.*{message}"):
        chat.render(TALK, None, "x, line 1")


def test_a_template_says_no_more_than_it_may(templated, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 50)
    chat = module.ChatTemplate(templated("a" * 51)[1], "hf", answers=False)
    with pytest.raises(InputError, match="(?s)does not do.*makes 51 characters of this talk; 1 to 50"):
        chat.render(TALK, None, "x, line 1")


# ------------------------------------------------------------------------------------------------------------------- masks


def prepared(folder: Path, file: Path, prefix: Path, **options) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and mask of every document that ``preprocess --answers-only`` makes."""
    named = {"input": (str(file),), "save": str(prefix), "tokenizer": str(folder), "answers_only": True}
    preprocess(PreprocessOptions(**named, **options), World())
    pair = open_pair(f"{prefix}_text_document")
    cut = lambda each: [part.tolist() for part in numpy.split(each.window(0, each.total).numpy(), each.ends[:-1])]
    return cut(pair), cut(open_mask(pair))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_mask_is_that_of_transformers(templated, tmp_path, workers):
    folder, tokenizer = templated(MARKED)
    talks = [[{**each, "content": each["content"] * number} for each in TALK[: 2 + 2 * (number % 2)]] for number in range(1, 9)]
    file = write(tmp_path / "x.jsonl", *({"messages": talk} for talk in talks))
    tokens, masks = prepared(folder, file, tmp_path / "p", workers=workers)
    for talk, found, mask in zip(talks, tokens, masks, strict=True):
        theirs = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ended = [] if theirs["input_ids"][-1] == 1 else [1]  # the end of the document, which nobody says
        assert found == theirs["input_ids"] + ended and mask == theirs["assistant_masks"] + [0] * len(ended)
        assert 0 < sum(mask) < len(mask)


def test_the_mask_is_the_answers_with_the_end_of_their_turn(templated, tmp_path):
    folder, tokenizer = templated(BRACKETS)
    file = write(tmp_path / "x.jsonl", {"messages": TALK}, {"messages": TALK[:1]}, {"messages": TALK[:2]})
    tokens, masks = prepared(folder, file, tmp_path / "p", workers=1)
    pieces = [(f"<s>[INST] {ASK} [/INST]", 0), (f" {SAY}</s>", 1), ("[INST] And  more? [/INST]", 0), (" no</s>", 1)]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    for found, mask, held in zip(tokens, masks, (pieces, pieces[:2]), strict=True):
        assert found == sum((encode(text) for text, _ in held), [])
        assert mask == sum(([counts] * len(encode(text)) for text, counts in held), [])
    record = json.loads((tmp_path / "p_text_document.json").read_text())
    assert record["left_out"] == {"without an answer": 1} and record["documents"] == 2
    assert sorted(path.name for path in tmp_path.glob("p_*")) == [
        *(f"p_text_document.{ending}" for ending in ("bin", "idx", "json")),
        *(f"p_text_document_mask.{ending}" for ending in ("bin", "idx")),
    ]
    plain = {"input": (str(file),), "save": str(tmp_path / "p"), "tokenizer": str(folder), "workers": 1}
    preprocess(PreprocessOptions(**plain, overwrite=True), World())  # the same tokens without a mask
    pair = open_pair(tmp_path / "p_text_document")
    assert pair.window(0, len(tokens[0])).tolist() == tokens[0] and pair.documents == 3
    assert not list(tmp_path.glob("p_*_mask*"))
    with pytest.raises(InputError, match="(?s)p_text_document does not say which of its tokens are answers.*--answers-only"):
        open_mask(pair)


def test_tokens_of_space_count_where_they_end():
    """Some tokenizers say of a token that is nothing but space where it ends, and no more."""
    from megatron_prune.text.parts import answer_mask

    #        "u:"    " "     "a:"    " "     "yes"   " "     "</s>"   "\n" of a text "u: a: yes </s>\n"
    offsets = [(0, 2), (3, 3), (3, 5), (6, 6), (6, 9), (10, 10), (10, 14), (15, 15)]
    assert answer_mask(offsets, [(5, 14)], False).tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert answer_mask([(0, 0), *offsets], [(0, 2), (6, 14)], True).tolist() == [0, 1, 0, 0, 0, 1, 1, 1, 0]


def test_what_is_not_the_mask_of_a_pair_is_refused(templated, tmp_path):
    folder, _ = templated(BRACKETS)
    prefixes = []
    for name, talk in (("a", TALK), ("b", TALK[:2]), ("c", [TALK[0], {"role": "assistant", "content": SAY[::-1]}, *TALK[2:]])):
        prepared(folder, write(tmp_path / f"{name}.jsonl", {"messages": talk}), tmp_path / name, workers=1)
        prefixes.append(f"{tmp_path / name}_text_document")
    pair, mask = open_pair(prefixes[0]), Path(f"{mask_prefix(prefixes[0])}.bin")
    whole = mask.read_bytes()
    for content, message in (
        (whole.replace(b"\1", b"\2"), "value 2"),
        (whole[1:] + whole[:1], "another digest"),
        (whole[:-1], "not whole"),
    ):
        mask.write_bytes(content)
        with pytest.raises(InputError, match=message):
            open_mask(pair)
    record = Path(f"{prefixes[0]}.json")
    for content, message in (
        (json.dumps({**json.loads(record.read_text()), "answers": 3}), "json: answers"),
        (json.dumps({**json.loads(record.read_text()), "answers": {"digest": None}}), "json: answers.digest"),
    ):
        record.write_text(content)
        with pytest.raises(InputError, match=message):
            open_mask(pair)
    record.unlink()
    os.mkfifo(record)  # no record of ours; never waited for
    for ending in ("bin", "idx"):
        mask.with_suffix(f".{ending}").write_bytes(Path(f"{mask_prefix(prefixes[1])}.{ending}").read_bytes())
    with pytest.raises(InputError, match="(?s)is not the mask of.*each document as long"):
        open_mask(pair)


@pytest.mark.parametrize(
    "records, options, message",
    [
        ([{"text": "plain"}], ["--answers-only"], "x.jsonl holds text that is no talk.*--answers-only marks"),
        ([{"messages": TALK}], ["--tokenizer-hf-include-special-tokens"], "x.jsonl holds talks.*leave out --tokenizer-hf"),
        ([{"messages": TALK[:1]}], ["--answers-only"], "no text in field 'text' with answers"),
    ],
)
def test_what_has_no_answers_is_refused(templated, tmp_path, capsys, records, options, message):
    file = write(tmp_path / "x.jsonl", *records)
    words = [
        "preprocess",
        "--input",
        str(file),
        "--tokenizer",
        str(templated(BRACKETS)[0]),
        "--output-prefix",
        str(tmp_path / "p"),
    ]
    with pytest.raises(SystemExit) as left:
        main([*words, "--workers", "1", *options])
    assert left.value.code == 2
    assert re.search(f"(?s){message}", capsys.readouterr().err)
