"""Ids in the JSON files of a directory, counts and maps on disk, and what damaged ones get."""

from __future__ import annotations

import base64
import json
import shutil

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizer_kinds import text

from megatron_prune.errors import CheckpointError, InputError, PlanError
from megatron_prune.vocabulary import id_fields
from megatron_prune.vocabulary.counts import Corpus, Counts, load_counts, merged
from megatron_prune.vocabulary.id_map import MAP_FILE, IdMap, load_map
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import open_vocabulary

CONFIG = {
    "vocab_size": 700,
    "hidden_size": 48,
    "bos_token_id": 3,
    "eos_token_id": [5, 9],
    "pad_token_id": -1,
    "image_token_index": 7,
    "vision_start_token_id": 8,
    "text_config": {"vocab_size": 700, "decoder_start_token_id": 11, "num_attention_heads": 9},
    "use_cache": True,
    "sep_token_id": None,
}
GENERATION = {
    "suppress_tokens": [3, 5],
    "begin_suppress_tokens": [220],
    "forced_decoder_ids": [[1, 11], [2, 220]],
    "bad_words_ids": [[3], [5, 7]],
    "stop_words_ids": [[9]],
    "sequence_bias": [[[3, 5], -1.5]],
    "max_length": 20,
    "forced_eos_token_id": 9,
    "top_k": 50,
}


def test_every_id_is_found_and_renumbered_and_nothing_else(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    decoder = {"3": {"content": "<s>", "lstrip": True}, "5": {"content": "</s>"}}
    (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "model_max_length": 5}))
    (source / "added_tokens.json").write_text(json.dumps({"<s>": 3, "</s>": 5}))
    assert set(id_fields.named_ids(source)) == {3, 5, 7, 8, 9, 11, 220}
    assert id_fields.added_tokens(source) == {3: "<s>", 5: "</s>"}
    new = {old: place for place, old in enumerate([3, 5, 7, 8, 9, 11, 220])}
    id_fields.renumber_files(source, target, new, 7)
    read = lambda name: json.loads((target / name).read_text())
    assert read("config.json") == {
        **CONFIG,
        "vocab_size": 7,
        "bos_token_id": 0,
        "eos_token_id": [1, 4],
        "image_token_index": 2,
        "vision_start_token_id": 3,
        "text_config": {"vocab_size": 7, "decoder_start_token_id": 5, "num_attention_heads": 9},
    }
    assert read("generation_config.json") == {
        **GENERATION,
        "suppress_tokens": [0, 1],
        "begin_suppress_tokens": [6],
        "forced_decoder_ids": [[1, 5], [2, 6]],
        "bad_words_ids": [[0], [1, 2]],
        "stop_words_ids": [[4]],
        "sequence_bias": [[[0, 1], -1.5]],
        "forced_eos_token_id": 4,
    }
    assert read("tokenizer_config.json")["added_tokens_decoder"] == {"0": decoder["3"], "1": decoder["5"]}
    assert read("added_tokens.json") == {"<s>": 0, "</s>": 1}
    assert json.loads((source / "config.json").read_text()) == CONFIG
    with pytest.raises(CheckpointError, match="bad_words_ids: 7"):
        id_fields.renumber_files(source, target, {**{i: i for i in (3, 5, 8, 9, 11, 220)}}, 7)


def test_ids_that_files_name_are_pinned_and_those_above_the_rows_refused(made, tmp_path):
    shutil.copytree(made("byte_level"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": [650, 651]}))
    assert {650, 651} <= set(open_vocabulary(tmp_path).pinned)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 700}))
    with pytest.raises(CheckpointError, match="(?s)above the model's 699.*700 .generation_config.json: eos_token_id"):
        open_vocabulary(tmp_path).pinned


@given(data=st.data())
def test_the_map_renumbers_any_run_of_tokens(cut, data):
    whole, trimmed, written = cut(data.draw(st.sampled_from(["byte_level", "json_and_ranks"])), 0.2)
    tokens = data.draw(st.lists(st.sampled_from(sorted(whole.pieces)), max_size=30))
    found, ends = trimmed.id_map.apply(numpy.array(tokens, dtype=numpy.uint16))
    split = trimmed.vocabulary.splitter(trimmed.new_ids)
    each = [[trimmed.new_ids[part] for part in ([token] if token in trimmed.new_ids else split(token))] for token in tokens]
    assert found.tolist() == sum(each, [])
    assert ends.tolist() == numpy.cumsum([len(part) for part in each]).tolist()
    assert written.decode(found.tolist()) == whole.decode(tokens)


def test_a_map_comes_back_as_it_was_written(cut, tmp_path):
    whole, trimmed, written = cut("llama2")
    found, made = load_map(written.folder), trimmed.id_map
    for name in ("new_to_old", "starts", "pieces", "old_to_new"):
        assert (getattr(found, name) == getattr(made, name)).all()
    with numpy.load(written.folder / MAP_FILE) as held:
        assert (held["d2t"] + numpy.arange(len(held["d2t"])) == trimmed.rows).all()
        assert numpy.flatnonzero(held["t2d"]).tolist() == trimmed.rows.tolist()
    data = made.dumps()
    for damaged in (b"", data[:100], b"no map", data[: len(data) // 2]):
        (tmp_path / "map.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="no map of a trimmed vocabulary"):
            load_map(tmp_path / "map.npz")
    wrong = IdMap(new_to_old=made.new_to_old, starts=made.starts, pieces=made.pieces + 1)
    (tmp_path / "map.npz").write_bytes(wrong.dumps())
    with pytest.raises(InputError, match="contradicts itself"):
        load_map(tmp_path / "map.npz")


def counts(*tables, weights=None, digest="d") -> Counts:
    corpora = [
        Corpus(name=f"c{n}", documents=1, tokens=sum(t), size=9, weight=w)
        for n, (t, w) in enumerate(zip(tables, weights or [None] * 9))
    ]
    return Counts(digest=digest, corpora=corpora, tables=[numpy.array(table) for table in tables])


def test_counts_add_up_or_are_weighted(tmp_path):
    assert counts([1, 2, 0], [3, 0, 4]).total().tolist() == [4, 2, 4]
    weighted = counts([1, 3, 0], [10, 0, 6], weights=[3.0, 1.0]).total()
    assert weighted.tolist() == pytest.approx([15 / 4 + 10 * 5 / 16, 45 / 4, 6 * 5 / 16])
    assert weighted.sum() == pytest.approx(20)
    both = counts([1, 3], [5, 1]).weighted(2.0)
    assert (both.tables[0].tolist(), both.corpora[0].weight, both.corpora[0].tokens) == ([6, 4], 2.0, 10)
    (tmp_path / "c").write_bytes(counts([1, 2, 0], [3, 0, 4], weights=[1.0, 2.0]).dumps())
    back = load_counts(tmp_path / "c")
    assert [table.tolist() for table in back.tables] == [[1, 2, 0], [3, 0, 4]] and back.corpora[1].weight == 2.0
    whole = merged([counts([1, 2]), counts([0, 5])])
    assert whole.total().tolist() == [1, 7]
    (tmp_path / "c.txt").write_bytes(counts([5, 0, 9, 5]).dump_text())
    assert (tmp_path / "c.txt").read_text() == "2 9\n0 5\n3 5\n1 0\n"
    with pytest.raises(InputError, match="without tokens has a weight.*\n.*c1"):
        counts([1, 2], [0, 0], weights=[1.0, 1.0]).total()
    with pytest.raises(InputError, match="different tokenizers"):
        merged([counts([1]), counts([1], digest="other")])
    with pytest.raises(InputError, match="weights for all or none"):
        merged([counts([1]), counts([1], weights=[1.0])]).total()


def test_damaged_counts_are_refused(tmp_path):
    (tmp_path / "c").write_bytes(counts([1, 2]).dumps())
    data = (tmp_path / "c").read_bytes()
    for damaged in (b"", data[:-4], data.replace(b"token counts", b"tokenXcounts"), b"0 1\n"):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(InputError, match="holds no token counts|is not a whole safetensors file"):
            load_counts(tmp_path / "bad")


# ------------------------------------------------------------------------------------------ tokenizers that are not right


def changed_json(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    return tmp_path


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda data: data["model"].update(type="WordPiece"), "model type 'WordPiece'.*BPE or Unigram"),
        (lambda data: data["model"]["merges"].append(["Q", "qqq"]), "merges do not fit the vocabulary.*'qqq'"),
        (lambda data: data["model"]["merges"].append("a"), "damaged"),
        (lambda data: data["model"]["vocab"].update(zz=-4), "model.vocab.zz\n.*got: -4"),
        (lambda data: data["model"]["vocab"].update(zz=5), "two tokens of the vocabulary have one id"),
        (lambda data: data["added_tokens"][1].update(id=300), "contradicts itself"),
        (lambda data: data.update(post_processor={"type": "Own"}), "damaged.*post-processor 'Own'"),
        (lambda data: data.pop("model"), "tokenizer.json: model\n.*the field is missing"),
        (lambda data: data["model"].update(byte_fallback=True), "lacks pieces"),
        (lambda data: data["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix '##'.*needed: none"),
        (lambda data: data["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (lambda data: data["model"].update(vocab={}, merges=[]), "empty vocabulary"),
    ],
)
def test_a_tokenizer_json_that_is_not_right(made, tmp_path, change, said):
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        open_vocabulary(changed_json(made("byte_level"), tmp_path, change))


def test_a_tokenizer_that_is_not_the_models(made):
    with pytest.raises(InputError, match="(?s)not the model's.*id 699.*below 512"):
        open_vocabulary(made("byte_level"), 512)


def test_two_tokenizers_in_one_directory(made, tmp_path):
    shutil.copytree(made("llama2"), tmp_path, dirs_exist_ok=True)
    shutil.copy(made("sentencepiece_unigram") / "tokenizer.model", tmp_path)
    with pytest.raises(CheckpointError, match="(?s)not the same tokenizer.*id "):
        open_vocabulary(tmp_path)


def test_no_tokenizer_and_damaged_ones(made, tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        open_vocabulary(tmp_path)
    for content in (b"", b"not a model", (made("llama2") / "tokenizer.model").read_bytes()[:1000]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError):
            open_vocabulary(tmp_path)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("merges.txt", b"\xff\xfe", "merges.txt is not UTF-8 text"),
        ("merges.txt", b"a b c\n", "damaged"),
        ("vocab.json", b"[1]", r"vocab.json\n  got: \[1\]"),
        ("vocab.json", b"{", "vocab.json is not JSON"),
    ],
)
def test_pairs_of_files_that_are_not_right(made, tmp_path, name, content, said):
    shutil.copytree(made("gpt2_files"), tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        open_vocabulary(tmp_path)


def changed_proto(folder, tmp_path, change):
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    change(proto)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    return tmp_path


def test_sentencepiece_models_that_are_not_right(made, tmp_path):
    def unknown_type(proto):
        entry = proto.pieces[300].SerializeToString().replace(b"\x18\x01", b"")  # the field of the type, if it is written
        proto.pieces[300].ParseFromString(entry + b"\x18\x2a")

    def lost_byte(proto):
        del proto.pieces[200]

    def word_model(proto):
        proto.trainer_spec.model_type = 3

    def twice(proto):
        proto.pieces[400].piece = proto.pieces[401].piece

    cases = [(unknown_type, "unknown type"), (lost_byte, "lacks pieces"), (word_model, "word or character"), (twice, "twice")]
    for change, said in cases:
        with pytest.raises(CheckpointError, match=said):
            open_vocabulary(changed_proto(made("sentencepiece_bpe"), tmp_path, change))


def test_rank_files_that_are_not_right(made, tmp_path):
    lines = (made("rank_file") / "toy.tiktoken").read_bytes().splitlines(keepends=True)
    cases = [
        (lines[:5] + [b"!!! 5\n"] + lines[6:], "line 6 is damaged"),
        (lines[:5] + [b"a 5\n"] + lines[6:], "line 6 is damaged"),
        (lines[:-2] + lines[-1:], "not 0 to"),
        (lines + [base64.b64encode(b"a") + b" %d\n" % len(lines)], "stands twice"),
    ]
    for content, said in cases:
        (tmp_path / "toy.tiktoken").write_bytes(b"".join(content))
        with pytest.raises(CheckpointError, match=said):
            open_vocabulary(tmp_path)
    (tmp_path / "toy.tiktoken").write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match="PAT_STR"):
        open_vocabulary(tmp_path).encode(["a"])


def test_code_beside_a_rank_file_is_read_and_not_run(made, tmp_path):
    shutil.copytree(made("rank_file"), tmp_path, dirs_exist_ok=True)
    code = (tmp_path / "tokenization_toy.py").read_text()
    (tmp_path / "tokenization_toy.py").write_text(code + f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    assert len(open_vocabulary(tmp_path).encode([text()])[0]) > 100
    assert not (tmp_path / "ran").exists()


def test_rows_of_a_plan_that_drop_what_must_stay(made):
    whole = open_vocabulary(made("byte_level"))
    longest = max(set(whole.pieces) - set(whole.pinned), key=lambda token: len(whole.pieces[token]))
    for rows, said in (
        (sorted(whole.pinned)[1:], "drops 1 tokens that must stay"),
        (sorted({*whole.pinned, longest}), "part of one"),
    ):
        with pytest.raises(PlanError, match=said):
            Trimmed(vocabulary=whole, rows=numpy.array(rows)).check("plan.json")


# --------------------------------------------------------------------------------------- tokenizers that are seldom so


def pinned_and_cut(folder, tmp_path, rows=None):
    """(whole, trimmed, written) with as few tokens as can be."""
    from megatron_prune.checkpoint.huggingface import copy_side_files

    whole = open_vocabulary(folder, rows)
    trimmed = Trimmed(vocabulary=whole, rows=numpy.array(sorted(whole.pinned)))
    out = tmp_path / "cut"
    out.mkdir()
    copy_side_files(folder, out)
    trimmed.write(out)
    return whole, trimmed, open_vocabulary(out, len(trimmed.rows))


def assert_exact(whole, trimmed, written):
    lines = [word for line in text().splitlines() for word in (line, *line.split())]
    for line, before, after in zip(lines, whole.encode(lines), written.encode(lines)):
        covered = all(token in trimmed.new_ids for token in before)
        assert ([trimmed.new_ids.get(token) for token in before] == list(after)) == covered
        assert written.decode(after) == whole.decode(before), line


def test_unused_pieces_that_others_are_joined_through(made, tmp_path):
    def unused(proto):
        for number in range(300, len(proto.pieces), 3):
            if len(proto.pieces[number].piece) > 1:
                proto.pieces[number].type = 5

    (tmp_path / "t").mkdir()
    assert_exact(*pinned_and_cut(changed_proto(made("sentencepiece_bpe"), tmp_path / "t", unused), tmp_path))


def test_bytes_to_fall_back_to_that_the_decoder_does_not_say(made, tmp_path):
    def plain_decoder(data):
        data["decoder"] = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}

    (tmp_path / "t").mkdir()
    (folder := changed_json(made("llama2"), tmp_path / "t", plain_decoder) / "tokenizer.model").unlink()
    whole, trimmed, written = pinned_and_cut(folder.parent, tmp_path)
    assert {number for number, piece in whole.pieces.items() if len(piece.decode()) == 1} <= set(trimmed.new_ids)
    assert_exact(whole, trimmed, written)


def test_the_lowest_score_stays_beside_bytes_too(made):
    whole = open_vocabulary(made("sentencepiece_unigram"))
    proto = sentencepiece_model_pb2.ModelProto.FromString((made("sentencepiece_unigram") / "tokenizer.model").read_bytes())
    normal = {number: entry.score for number, entry in enumerate(proto.pieces) if entry.type == 1}
    assert min(normal, key=normal.get) in whole.pinned


@pytest.mark.parametrize("gap, said", [(0, "SPECIAL_START_ID: int = {}"), (5, "SPECIAL_START_ID = {}")])
def test_rows_above_the_ranks_stay_however_the_code_says_it(made, tmp_path, gap, said):
    shutil.copytree(made("rank_file"), tmp_path / "t")
    code, ranks = tmp_path / "t/tokenization_toy.py", 697
    old = code.read_text()
    assert f"SPECIAL_START_ID = {ranks}" in old
    code.write_text(old.replace(f"SPECIAL_START_ID = {ranks}", said.format(ranks + gap)))
    whole, trimmed, written = pinned_and_cut(tmp_path / "t", tmp_path, ranks + gap + 8)
    assert set(range(ranks, ranks + gap + 8)) <= set(trimmed.new_ids)
    assert said.format(trimmed.new_ids[ranks + gap]) in (tmp_path / "cut/tokenization_toy.py").read_text()


def test_rows_above_ranks_that_nothing_explains_stay(made, tmp_path):
    shutil.copy(made("rank_file") / "toy.tiktoken", tmp_path)
    assert {697, 698, 699} <= set(open_vocabulary(tmp_path, 700).files[0].pieces | open_vocabulary(tmp_path, 700).pinned)


def test_dropout_does_not_make_counts_random(made, tmp_path):
    folder = changed_json(made("byte_level"), tmp_path, lambda data: data["model"].update(dropout=0.5))
    whole = open_vocabulary(folder)
    assert whole.encode([text()]) == whole.encode([text()]) == open_vocabulary(made("byte_level")).encode([text()])


def test_a_token_with_a_symbol_that_nothing_says(made, tmp_path):
    folder = changed_json(made("byte_level"), tmp_path / "t", lambda data: data["model"]["vocab"].update({"<|你 x|>": 700}))
    whole, trimmed, _ = pinned_and_cut(folder, tmp_path)
    assert 700 not in trimmed.new_ids
    starts = trimmed.id_map.starts
    assert [trimmed.rows[new] for new in trimmed.id_map.pieces[starts[700] : starts[701]]]  # what can be said of it


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": "<s>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"bos_token": 5, "chat_template": "a"}),
        ("special_tokens_map.json", [1]),
        ("added_tokens.json", {"<x>": "a"}),
        ("generation_config.json", {"forced_decoder_ids": [5]}),
    ],
)
def test_json_files_that_are_not_as_they_should_be(made, tmp_path, name, content):
    shutil.copytree(made("byte_level"), tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=name if "template" not in str(content) else "chat template|tokenizer_config"):
        open_vocabulary(tmp_path).pinned
