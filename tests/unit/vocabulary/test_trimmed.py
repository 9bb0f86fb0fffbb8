"""A trimmed tokenizer of every kind beside the whole one, each run by its own library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, OTHER, TEMPLATE, text

from megatron_prune.checkpoint.huggingface import copy_side_files
from megatron_prune.errors import InputError
from megatron_prune.vocabulary.selection import Wanted, select
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import open_vocabulary

NAMES = sorted(KINDS)
BPE = [name for name in NAMES if "unigram" not in name]

unicode_texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
common_texts = st.lists(st.sampled_from([*" \n\t.,", *text().split()[:200], *OTHER.split()]), max_size=12).map(" ".join)
texts = st.lists(unicode_texts | common_texts, min_size=1, max_size=20)


def ids(found) -> list[list[int]]:
    return [list(one) for one in found]


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("kind", NAMES)
@given(texts=texts)
def test_a_text_encodes_as_before_exactly_if_all_its_tokens_stay(cut, kind, share, texts):
    whole, trimmed, written = cut(kind, share)
    for file, new in zip(whole.files, written.files):  # every form by its own runtime
        for before, after in zip(ids(file.encode(texts)), ids(new.encode(texts))):
            covered = all(token in trimmed.new_ids for token in before)
            assert ([trimmed.new_ids.get(token) for token in before] == after) == covered


@pytest.mark.parametrize("kind", NAMES)
@given(texts=texts)
def test_every_text_encodes_and_decodes_to_what_it_did(cut, kind, texts):
    whole, trimmed, written = cut(kind, 0.1)
    for file, new in zip(whole.files, written.files):
        for before, after in zip(ids(file.encode(texts)), ids(new.encode(texts))):
            assert new.decode(after) == file.decode(before)
            assert all(0 <= token < len(trimmed.rows) for token in after)


@pytest.mark.parametrize("kind", ["json_and_ranks", "llama2"])
@given(texts=texts)
def test_the_forms_of_one_tokenizer_agree_after_trimming(cut, kind, texts):
    whole, _, written = cut(kind, 0.3)
    assert len(written.files) == 2 == len(whole.files)
    for one, other, was_one, was_other in zip(*(ids(file.encode(texts)) for file in (*written.files, *whole.files))):
        if was_one == was_other:
            assert one == other


@pytest.mark.parametrize("kind", BPE)
def test_every_kept_token_that_could_be_reached_still_is(cut, kind):
    whole, trimmed, written = cut(kind)
    split = whole.splitter({token: token for token in range(whole.rows)})
    split_new = written.splitter({token: token for token in range(written.rows)})
    reached = [token for token in trimmed.rows.tolist() if token in whole.main.pieces and split(token) == [token]]
    assert len(reached) > 200
    for token in reached:
        new = trimmed.new_ids[token]
        assert split_new(new) == [new], whole.text(token)


@pytest.mark.parametrize("kind", NAMES)
def test_ids_are_new_in_the_old_order_and_mean_what_they_meant(cut, kind):
    whole, trimmed, written = cut(kind)
    assert sorted(trimmed.new_ids.values()) == list(range(len(trimmed.rows)))
    assert (numpy.diff(trimmed.rows) > 0).all()
    assert {new: whole.pieces.get(old) for old, new in trimmed.new_ids.items() if old in whole.pieces} == written.pieces
    assert set(whole.pinned) <= set(trimmed.new_ids)
    assert {trimmed.new_ids[token]: text for token, text in whole.added.items()} == written.added


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_words", "json_and_ranks", "llama2"])
def test_a_merge_goes_exactly_if_one_of_its_three_tokens_goes(cut, kind):
    whole, trimmed, written = cut(kind)
    before, after = (json.loads((v.folder / "tokenizer.json").read_text())["model"] for v in (whole, written))
    pairs = lambda model: [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    stays = lambda pair: {*pair, "".join(pair)} <= set(after["vocab"])
    assert pairs(after) == [pair for pair in pairs(before) if stays(pair)]
    assert 0 < len(after["merges"]) < len(before["merges"])


@pytest.mark.parametrize("kind", NAMES)
def test_the_whole_vocabulary_keeps_every_file_byte_for_byte(made, tmp_path, kind):
    whole = open_vocabulary(made(kind))
    copy_side_files(whole.folder, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    trimmed = Trimmed(vocabulary=whole, rows=select(whole, None, Wanted(size=whole.rows)).rows)
    trimmed.write(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (trimmed.id_map.old_to_new == numpy.arange(whole.rows)).all()


@pytest.mark.parametrize("kind", NAMES)
def test_written_again_with_all_its_tokens_a_trimmed_tokenizer_is_the_same(cut, tmp_path, kind):
    _, _, written = cut(kind)
    everything = {token: token for token in range(written.rows)}
    copy_side_files(written.folder, tmp_path)
    for file in written.files:
        file.write(tmp_path, everything)
    again = open_vocabulary(tmp_path)
    assert again.pieces == written.pieces
    for file in written.files:
        assert (tmp_path / file.path.name).read_bytes() == file.path.read_bytes()


def test_trimmed_tokenizers_load_in_the_libraries_that_run_them(cut):
    import tiktoken
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    whole, trimmed, written = cut("byte_level")
    old, new = (AutoTokenizer.from_pretrained(vocabulary.folder) for vocabulary in (whole, written))
    talk = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    before = old.apply_chat_template(talk, return_dict=False)
    assert new.apply_chat_template(talk, return_dict=False) == [trimmed.new_ids[token] for token in before]
    assert new.apply_chat_template(talk, tokenize=False) == old.apply_chat_template(talk, tokenize=False)
    assert new("x")["input_ids"][0] == trimmed.new_ids[old.bos_token_id] == new.bos_token_id
    assert (new.eos_token, new.bos_token, len(new)) == (old.eos_token, old.bos_token, len(written.pieces))
    whole, trimmed, written = cut("sentencepiece_bpe")
    processor = SentencePieceProcessor(model_file=str(written.folder / "tokenizer.model"))
    assert processor.get_piece_size() == len(trimmed.rows) - sum(row not in whole.pieces for row in trimmed.rows.tolist())
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)
    _, _, written = cut("rank_file")
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(written.folder / "toy.tiktoken"))
    from tokenizer_kinds import PATTERN

    encoding = tiktoken.Encoding("toy", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert encoding.decode(encoding.encode_ordinary(OTHER)) == OTHER


def test_the_constant_of_a_rank_file_follows_the_ranks(cut):
    whole, trimmed, written = cut("rank_file")
    code, old = ((v.folder / "tokenization_toy.py").read_text() for v in (written, whole))
    kept = len(written.main.pieces)
    assert f"SPECIAL_START_ID = {kept}  # first after the ranks\n" in code
    assert code.replace(f"= {kept} ", f"= {len(whole.main.pieces)} ") == old
    specials = range(len(whole.main.pieces), whole.rows)  # rows above the ranks are special: all stay, behind the ranks
    assert [trimmed.new_ids[token] for token in specials] == list(range(kept, kept + len(specials)))


def test_what_a_template_says_stays(cut):
    whole, trimmed, written = cut("byte_level", 0.0)
    said = [TEMPLATE.split("%}")[1].split("{{")[0], "user\n", "assistant", "<|im_start|>", "\n"]
    for before, after in zip(ids(whole.encode(said)), ids(written.encode(said))):
        assert [trimmed.new_ids[token] for token in before] == after


def test_too_few_rows_name_what_must_stay(made):
    whole = open_vocabulary(made("byte_level"))
    with pytest.raises(InputError, match=f"(?s)256 byte.*at least {len(whole.pinned)}"):
        select(whole, None, Wanted(size=len(whole.pinned) - 1))
    assert len(select(whole, None, Wanted(size=len(whole.pinned))).rows) == len(whole.pinned)
    with pytest.raises(InputError, match="700 rows"):
        select(whole, None, Wanted(size=701))


def test_post_processor_padding_and_unknown_ids_are_renumbered(made, tmp_path):
    file = "tokenizer.json"
    copy_side_files(made("unigram_json"), tmp_path)
    data = json.loads((tmp_path / file).read_text())
    pad = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0}
    data["padding"] = {**pad, "pad_token": "</s>"}
    data["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<unk>", 2], "trim_offsets": True, "add_prefix_space": True}
        ],
    }
    data["model"]["vocab"].insert(0, ["zzzzqq", -1.0])  # an ordinary piece below the specials, so that all ids move
    data["model"]["unk_id"] += 1
    for token in data["added_tokens"]:
        token["id"] += 1
    data["padding"]["pad_id"] = 2
    data["post_processor"]["processors"][0].update(sep=["</s>", 2], cls=["<unk>", 3])
    (tmp_path / file).write_text(json.dumps(data))
    whole = open_vocabulary(tmp_path)
    trimmed = Trimmed(vocabulary=whole, rows=numpy.array(sorted(set(whole.pinned))))
    assert 0 not in trimmed.new_ids
    out = tmp_path / "out"
    out.mkdir()
    copy_side_files(tmp_path, out)
    trimmed.write(out)
    new = json.loads((out / file).read_text())
    assert (new["padding"]["pad_id"], new["model"]["unk_id"]) == (1, 2)
    assert new["post_processor"]["processors"][0]["sep"] == ["</s>", 1] and new["post_processor"]["processors"][0]["cls"] == [
        "<unk>",
        2,
    ]
    assert [token["id"] for token in new["added_tokens"]] == [0, 1, 2]


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3", "vocab.bpe", "vocab.json"])
def test_files_that_say_the_old_vocabulary_again_are_left_out(made, tmp_path: Path, name):
    whole = open_vocabulary(made("byte_level"))
    copy_side_files(whole.folder, tmp_path)
    (tmp_path / name).write_text("old")
    Trimmed(vocabulary=whole, rows=numpy.array(sorted(whole.pinned))).write(tmp_path)
    assert not (tmp_path / name).exists()
