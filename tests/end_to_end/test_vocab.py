"""``megatron-prune vocab …``: a vocabulary counted, chosen, cut and renumbered, in models of both kinds."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import rank_jobs
import torch
from rank_jobs_recovery import recover
from ranks import RankFailed
from shells import ROOT, bash, given_to_python, run_file
from tiny import build_tiny, logits, state_dict
from tokenizer_kinds import byte_level, gpt2_files, llama2, rank_file, text

from megatron_prune.checkpoint import megatron
from megatron_prune.cli.main import main
from megatron_prune.errors import CheckpointError, InputError, PlanError
from megatron_prune.opening.opened import open_with_vocabulary
from megatron_prune.planning.plan import load_plan
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.preprocess import PreprocessOptions, preprocess
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf
from megatron_prune.steps.transfer import TransferOptions, transfer
from megatron_prune.steps.vocab_count import VocabCountOptions, vocab_count
from megatron_prune.steps.vocab_remap import VocabRemapOptions, vocab_remap
from megatron_prune.steps.vocab_select import VocabSelectOptions, vocab_select
from megatron_prune.steps.vocab_trim import VocabTrimOptions, vocab_trim
from megatron_prune.vocabulary.counts import load_counts
from megatron_prune.vocabulary.folder import vocabulary_of
from megatron_prune.vocabulary.id_map import load_map
from megatron_prune.vocabulary.vocabulary import open_vocabulary

ROWS, SIZE = 720, 420


def model_with(folder: Path, tokenizer=byte_level, **changes) -> Path:
    """A tiny model of 720 rows with a tokenizer of 700 tokens."""
    build_tiny(folder, changes.pop("family", "llama"), vocab_size=ROWS, bos_token_id=1, eos_token_id=[2, 0], **changes)
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_with(tmp_path_factory.mktemp("model") / "hf", dtype="float32")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text(text(), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def counts(model, corpus, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("counts") / "counts.safetensors"
    count(model, corpus, file)
    return file


def count(model: Path, corpus: Path | list[str], output: Path, **more) -> None:
    inputs = tuple(corpus) if isinstance(corpus, list) else (str(corpus),)
    vocab_count(VocabCountOptions(tokenizer=str(model), input=inputs, save=str(output), workers=1, **more), World())


def trim(source: Path, save: Path, counts: Path | None = None, **more) -> Path:
    named = {"counts": (str(counts),)} if counts else {}
    vocab_trim(VocabTrimOptions(load=str(source), save=str(save), **named, **more), World())
    return save


# ---------------------------------------------------------------------------------------------------------------- counts


def table(file: Path) -> list[int]:
    return load_counts(file).total().astype(int).tolist()


def test_counts_are_those_of_the_tokenizer_whatever_form_the_corpus_has(model, corpus, counts, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    held = load_counts(counts)
    expected = numpy.zeros(ROWS, dtype=int)
    found = tokenizer(corpus.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert len(corpus.read_text(encoding="utf-8")) < 1 << 14  # one document
    numpy.add.at(expected, found, 1)
    assert table(counts) == expected.tolist()
    assert held.corpora[0].tokens == sum(table(counts)) > 3000
    lines = [line for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    count(model, tmp_path / "c.jsonl", tmp_path / "jsonl", data_field="body", text=str(tmp_path / "freq.txt"))
    by_line = numpy.zeros(ROWS, dtype=int)
    for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]:
        numpy.add.at(by_line, ids, 1)
    assert table(tmp_path / "jsonl") == by_line.tolist()
    pairs = [tuple(map(int, line.split())) for line in (tmp_path / "freq.txt").read_text().splitlines()]
    assert pairs == sorted(enumerate(by_line.tolist()), key=lambda pair: -pair[1])
    options = {"input": (str(tmp_path / "c.jsonl"),), "json_keys": ("body",), "append_eod": False, "workers": 1}
    preprocess(PreprocessOptions(tokenizer=str(model), save=str(tmp_path / "p"), **options), World())
    count(model, tmp_path / "p_body_document", tmp_path / "pair")
    assert table(tmp_path / "pair") == by_line.tolist()
    weighted = [f"{tmp_path / 'c.jsonl'}:1", f"{corpus}:3"]
    count(model, weighted, tmp_path / "both", data_field="body")
    whole = load_counts(tmp_path / "both")
    assert [corpus.weight for corpus in whole.corpora] == [1.0, 3.0]
    assert whole.total().sum() == pytest.approx(sum(corpus.tokens for corpus in whole.corpora))


def test_any_number_of_workers_counts_the_same_and_a_killed_run_goes_on(model, tmp_path):
    big = tmp_path / "big.txt"
    big.write_text("".join(f"{line} {number}\n" for number in range(12000) for line in text().splitlines()[:6]), encoding="utf-8")
    count(model, big, tmp_path / "one")
    command = [sys.executable, "-m", "megatron_prune", "vocab", "count", "--tokenizer", str(model), "--input", str(big)]
    command += ["--output", str(tmp_path / "two"), "--workers", "2"]
    slow = "import megatron_prune.vocabulary.counting as c, sys; c._KEEP_EVERY = 0.0; c._PART = 1 << 17\n"
    slow += "from megatron_prune.cli.main import main\nif __name__ == '__main__': main(sys.argv[1:])\n"
    script = tmp_path / "slow.py"
    script.write_text(slow)
    process = subprocess.Popen([sys.executable, str(script), *command[3:]], stderr=subprocess.DEVNULL)
    state = tmp_path / ".two.work/content/corpus-0"
    limit = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not (tmp_path / "two").exists()
    done = subprocess.run([sys.executable, str(script), *command[3:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert table(tmp_path / "two") == table(tmp_path / "one")
    assert not state.parent.exists()


# ----------------------------------------------------------------------------------------------------------------- models


def covered_text(whole, kept: set[int]) -> list[int]:
    """The longest line whose tokens all stay."""
    lines = [ids for ids in whole.encode([line for line in text().splitlines() if line.strip()]) if set(ids) <= kept]
    return list(max(lines, key=len))


@pytest.mark.parametrize("tied", [False, True])
def test_a_covered_text_gives_the_same_logits_bit_for_bit(tmp_path, counts, tied):
    source = model_with(tmp_path / "hf", dtype="float32", tie_word_embeddings=tied, shard="60KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    out = trim(source, tmp_path / "out", counts, remain_vocab_size=SIZE, report=str(tmp_path / "report.json"))
    ids = load_map(out)
    tokens = covered_text(open_vocabulary(source, ROWS), set(ids.new_to_old.tolist()))
    assert len(tokens) > 5
    before = logits(source, torch.tensor([tokens]))[..., torch.from_numpy(ids.new_to_old)]
    assert torch.equal(logits(out, torch.from_numpy(ids.old_to_new[tokens])[None]), before)
    whole, cut = state_dict(source), state_dict(out)
    heads = {"model.embed_tokens.weight", "lm_head.weight"} & set(whole)
    assert len(heads) == 2 - tied and set(whole) == set(cut)
    for name, value in whole.items():
        assert torch.equal(cut[name], value[ids.new_to_old] if name in heads else value)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == SIZE and config["tie_word_embeddings"] == tied
    assert config["eos_token_id"] == ids.old_to_new[[2, 0]].tolist() and config["bos_token_id"] == ids.old_to_new[1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tokens"] == {"before": ROWS, "after": SIZE}
    removed = (ROWS - SIZE) * 48 * (2 - tied)
    assert report["parameters"]["before"] - report["parameters"]["after"] == removed
    assert report["parameters"]["bytes_saved"] == 4 * removed


@pytest.mark.parametrize("kind", [llama2, rank_file, gpt2_files], ids=lambda kind: kind.__name__)
def test_models_with_tokenizers_of_other_kinds(tmp_path, kind):
    source = model_with(tmp_path / "hf", kind, dtype="float32")
    if kind is gpt2_files:  # its configuration is that of the model here
        config = build_tiny(tmp_path / "again", vocab_size=ROWS, dtype="float32") / "config.json"
        shutil.copy(config, source / "config.json")
    out = trim(source, tmp_path / "out", remain_vocab_size=500)
    ids, cut = load_map(out), open_vocabulary(out, 500)
    assert cut.rows == 500 and max(max(cut.encode([text()])[0]), *cut.pieces) < 500
    tokens = ids.new_to_old[::23].tolist()
    before = logits(source, torch.tensor([tokens]))[..., torch.from_numpy(ids.new_to_old)]
    assert torch.equal(logits(out, torch.from_numpy(ids.old_to_new[tokens])[None]), before)


def test_an_old_bin_file_is_read_and_becomes_safetensors(model, counts, tmp_path):
    source = tmp_path / "old"
    shutil.copytree(model, source)
    torch.save(state_dict(model), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    out = trim(source, tmp_path / "out", counts, remain_vocab_size=SIZE)
    expected = trim(model, tmp_path / "expected", counts, remain_vocab_size=SIZE)
    assert not list(out.glob("*.bin"))
    left, right = state_dict(out), state_dict(expected)
    assert all(torch.equal(left[name], right[name]) for name in right)


def files_of(folder: Path) -> list[str]:
    return sorted(
        file.name for file in folder.iterdir() if file.name not in ("README.md", "megatron_prune_recipe.json", "plan.json")
    )


LAYOUTS = [(1, 1, 1, "torch_dist"), (2, 2, 1, "torch"), (3, 3, 1, "torch_dist"), (4, 2, 2, "torch_dist")]


@pytest.mark.parametrize("size, tp, pp, ckpt_format", LAYOUTS)
def test_a_megatron_checkpoint_trimmed_under_ranks_is_the_trimmed_model(
    ranks, model, counts, tmp_path, size, tp, pp, ckpt_format
):
    layout = {"target_tensor_parallel_size": tp, "target_pipeline_parallel_size": pp, "make_vocab_size_divisible_by": 16}
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m"), ckpt_format=ckpt_format, **layout), World())
    asked = {"load": str(tmp_path / "m"), "save": str(tmp_path / "t"), "counts": (str(counts),), "coverage": 0.99}
    ranks(size).run(rank_jobs.run_steps, ("vocab_trim", asked))
    opened = megatron.open_checkpoint(tmp_path / "t")
    assert opened.format == ckpt_format and (opened.layout.tensor, opened.layout.pipeline) == (tp, pp)
    kept = opened.config.vocab_size
    assert kept % (16 * tp) == 0 and opened.layout.padded_vocab(kept) == kept  # filled with tokens: nothing is padded
    export(ExportOptions(load=str(tmp_path / "t"), save=str(tmp_path / "back")), World())
    expected = trim(model, tmp_path / "expected", counts, remain_vocab_size=kept)
    names = files_of(expected)
    assert files_of(tmp_path / "back") == names
    assert filecmp.cmpfiles(tmp_path / "back", expected, names, shallow=False) == (names, [], [])


def test_an_exact_size_is_padded_as_megatron_pads_and_the_true_size_is_kept(model, counts, tmp_path):
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m"), target_tensor_parallel_size=2), World())
    trim(tmp_path / "m", tmp_path / "t", counts, remain_vocab_size=SIZE + 1)
    opened = megatron.open_checkpoint(tmp_path / "t")
    assert opened.config.vocab_size == SIZE + 1 and opened.layout.padded_vocab(SIZE + 1) == 512
    trim(tmp_path / "m", tmp_path / "r", counts, remain_vocab_size=SIZE + 1, multiple_of=64)
    assert megatron.open_checkpoint(tmp_path / "r").config.vocab_size == 448


# --------------------------------------------------------------------------------------------- with pruning and recovery


@pytest.fixture(scope="module")
def plan(model, counts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "vocab.json"
    options = {"load": str(model), "counts": (str(counts),), "remain_vocab_size": 480, "save_plan": str(path)}
    vocab_select(VocabSelectOptions(**options), World())
    return path


def by_prune_hf(source: Path, save: Path, **options) -> Path:
    prune_hf(PruneHfOptions(load=str(source), save=str(save), **options), World())
    return save


@pytest.mark.parametrize("size, tp", [(1, 1), (3, 3)])
def test_a_vocabulary_goes_in_one_run_with_other_axes(ranks, model, plan, tmp_path, size, tp):
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m")), World())
    options = {"load": str(tmp_path / "m"), "vocab_plan": str(plan), "ffn_hidden_size_remain": 48, "metric": "magnitude"}
    options |= {"save": str(tmp_path / "p"), "save_plan": str(tmp_path / "all.json"), "tensor_model_parallel_size": tp}
    ranks(size).run(rank_jobs.run_steps, ("prune", options))
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "one")), World())
    alone = trim(model, tmp_path / "alone", plan=str(plan))
    oracle = load_plan(tmp_path / "all.json").with_tokens_of(None)
    assert oracle.made_by["vocab"] == load_plan(plan).made_by["vocab"]
    (tmp_path / "ffn.json").write_text(oracle.dumps())
    both = by_prune_hf(model, tmp_path / "ffn", plan=str(tmp_path / "ffn.json"))
    expected, found = state_dict(both), state_dict(tmp_path / "one")
    rows = load_map(alone).new_to_old
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected[name] = expected[name][rows]
    assert all(torch.equal(found[name], expected[name]) for name in expected) and len(found) == len(expected)
    for name in ("tokenizer.json", "vocab_map.npz"):
        assert (tmp_path / "one" / name).read_bytes() == (alone / name).read_bytes()
    again = by_prune_hf(model, tmp_path / "again", plan=str(tmp_path / "all.json"))
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_what_is_refitted_has_the_smaller_vocabulary_too(model, plan, corpus, tmp_path):
    fit = {"ffn_hidden_size_remain": 64, "data": (f"{corpus}:1",), "nsamples": 4, "seq_length": 32, "reconstruct": 0}
    whole = by_prune_hf(model, tmp_path / "whole", **fit)
    both = by_prune_hf(model, tmp_path / "both", vocab_plan=str(plan), **fit)
    rows = load_map(both).new_to_old
    left, right = state_dict(both), state_dict(whole)
    for name, value in right.items():
        assert torch.equal(left[name], value[rows] if name in ("model.embed_tokens.weight", "lm_head.weight") else value), name
    assert len(rows) == 480


def test_a_budget_counts_the_smaller_vocabulary(model, plan, tmp_path):
    whole = sum(value.numel() for value in state_dict(model).values())
    removed = 2 * 240 * 48
    most = whole - removed - 10_000
    save = by_prune_hf(model, tmp_path / "p", vocab_plan=str(plan), params=str(most), metric="magnitude")
    assert most - removed < sum(value.numel() for value in state_dict(save).values()) <= most
    assert json.loads((save / "config.json").read_text())["vocab_size"] == 480


def tokenised_lines(model: Path, folder: Path) -> list[str]:
    """Lines that are the documents of the pair ``old_text_document`` in ``folder``."""
    lines = [line for line in text().splitlines() if line.strip()]
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = {"input": (str(folder / "c.jsonl"),), "tokenizer": str(model), "save": str(folder / "old"), "workers": 1}
    preprocess(PreprocessOptions(**options), World())
    return lines


def test_recovery_trains_on_renumbered_data(ranks, model, plan, tmp_path):
    tokenised_lines(model, tmp_path)
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m")), World())
    trim(tmp_path / "m", tmp_path / "t", plan=str(plan))
    old, new = (str(tmp_path / f"{name}_text_document") for name in ("old", "new"))
    run = {"load": str(tmp_path / "t"), "seq_length": 32, "train_iters": 2, "global_batch_size": 2, "lr": 1e-3}
    run |= {"split": "80,20,0", "eval_iters": 1, "tensor_model_parallel_size": 2}
    with pytest.raises(RankFailed, match="tokenizer that is not the model's|not in the model's vocabulary"):
        ranks(2).run(recover, {**run, "save": str(tmp_path / "no"), "data_path": (old,)})
    vocab_remap(VocabRemapOptions(input=old, save=new, map=str(tmp_path / "t")), World())
    ranks(2).run(recover, {**run, "save": str(tmp_path / "r"), "data_path": (new,)})
    export(ExportOptions(load=str(tmp_path / "r"), save=str(tmp_path / "back")), World())
    assert state_dict(tmp_path / "back")["lm_head.weight"].shape[0] == 480 == open_vocabulary(tmp_path / "back").rows


# ------------------------------------------------------------------------------------------------------------------ remap


def documents(prefix: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix, mmap=False)
    ends = data.document_indices
    return [sum((data[number].tolist() for number in range(*pair)), []) for pair in zip(ends, ends[1:])]


def test_renumbered_documents_are_the_same_text(model, counts, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from megatron_prune.text import pair

    out = trim(model, tmp_path / "t", counts, remain_vocab_size=SIZE)
    lines = tokenised_lines(model, tmp_path)
    old, new = (str(tmp_path / f"{name}_text_document") for name in ("old", "new"))
    monkeypatch.setattr(pair, "_BLOCK", 97)  # blocks end inside sequences
    vocab_remap(VocabRemapOptions(input=old, save=new, map=str(out)), World())
    before, after = documents(old), documents(new)
    assert len(before) == len(after) == len(lines)
    whole, cut = (AutoTokenizer.from_pretrained(folder) for folder in (model, out))
    ids = load_map(out)
    for line, was, found in zip(lines, before, after):
        assert found[-1] == cut.eos_token_id == ids.old_to_new[was[-1]]
        assert cut.decode(found[:-1]) == whole.decode(was[:-1]) == line
        expected = [new for token in was for new in ids.pieces[ids.starts[token] : ids.starts[token + 1]].tolist()]
        assert found == expected
    record = json.loads(Path(f"{new}.json").read_text())
    assert record["tokens"] == sum(map(len, after)) and record["tokenizer"]["vocab_size"] == SIZE
    with pytest.raises(InputError, match="trimmed vocabulary already"):
        vocab_remap(VocabRemapOptions(input=new, save=str(tmp_path / "x"), map=str(out)), World())
    for ending in ("bin", "idx"):  # a mask of answers would no longer be theirs
        Path(f"{old}_mask.{ending}").write_bytes(Path(f"{old}.{ending}").read_bytes())
    with pytest.raises(InputError, match="(?s)says which tokens are answers.*preprocess --answers-only"):
        vocab_remap(VocabRemapOptions(input=old, save=str(tmp_path / "x"), map=str(out)), World())


def test_a_folder_is_counted_once_and_the_file_says_what_was_read(model, tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    for name in ("a.txt", ".b.txt", "c.pdf"):
        (folder / name).write_text("some words")
    os.link(folder / "a.txt", folder / "z.txt")
    count(model, folder, tmp_path / "once")
    count(model, folder / "a.txt", tmp_path / "file")
    assert table(tmp_path / "once") == table(tmp_path / "file")
    passed = {"hidden": [".b.txt"], "no ending of text that is read": ["c.pdf"], "other names of files that are read": ["z.txt"]}
    assert load_counts(tmp_path / "once").corpora[0].contents == {"files": ["a.txt"], "passed_over": passed}
    with pytest.raises(InputError, match="(?s)--input: .*z.txt would be read twice"):
        count(model, [str(folder), str(folder / "z.txt")], tmp_path / "twice")


# -------------------------------------------------------------------------------------------------------------- the shells


def test_the_source_systems_commands(model, corpus, tmp_path, capsys):
    folder = ROOT / "emb_pruner/llama_emb_pruner"
    counting = "emb_pruner/llama_emb_pruner/get_vocab_freq.sh"
    files = {"VOCAB_FREQ": tmp_path / "freq", "REMAIN_VOCAB_IDS": tmp_path / "remain_vocab_ids.pt", "REMAIN_VOCAB_SIZE": SIZE}
    words = given_to_python(tmp_path, counting, DATA_PATH=corpus, DATA_TYPE="txt", SPM=model, **files)
    assert run_file(*words) == 0
    ids = torch.load(tmp_path / "remain_vocab_ids.pt", weights_only=True)
    assert isinstance(ids, list) and len(ids) == SIZE and ids == sorted(ids)
    assert len((tmp_path / "freq.txt").read_text().splitlines()) == ROWS
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    names = ["--remain_vocab_path", tmp_path / "remain_vocab_ids.pt", "--remain_ids_with_spt", tmp_path / "with_spt.pt"]
    shutil.copytree(model, tmp_path / "copy")
    words = [sys.executable, folder / "prune_spm_and_emb.py", "--hf_dir", tmp_path / "copy", *names]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = torch.load(tmp_path / "with_spt.pt", weights_only=True)
    assert rows.dtype == torch.int64 and rows.tolist() == ids
    cut = state_dict(tmp_path / "copy_pruned")
    assert torch.equal(cut["model.embed_tokens.weight"], state_dict(model)["model.embed_tokens.weight"][rows])
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == before  # never in place
    words = given_to_python(tmp_path, counting, DATA_PATH=corpus, DATA_TYPE="mmap", SPM=model)
    assert run_file(*words) == 2 and "--data_type" in capsys.readouterr().err
    assert bash(counting).returncode == 2


def test_a_list_without_what_must_stay_gets_it(model, tmp_path):
    torch.save([650, 651], tmp_path / "ids.pt")
    out = trim(model, tmp_path / "out", keep_ids=str(tmp_path / "ids.pt"))
    whole = open_vocabulary(model, ROWS)
    assert set(load_map(out).new_to_old.tolist()) == whole.derivations.closure({*whole.pinned, 650, 651})


def test_a_tokenizer_without_a_model(tmp_path):
    source = llama2(tmp_path / "tok")
    out = trim(source, tmp_path / "out", remain_vocab_size=400)
    cut = open_vocabulary(out)
    assert cut.rows == 400 and len(cut.files) == 2
    with pytest.raises(InputError, match="a tokenizer alone"):
        vocab_select(VocabSelectOptions(load=str(source), remain_vocab_size=400, save_plan=str(tmp_path / "p")), World())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "nothing says which tokens stay"),
        ({"remain_vocab_size": 12}, "(?s)must stay.*at least 29"),
        ({"remain_vocab_size": 721}, "720 rows"),
        ({"remain_vocab_size": 0}, "--remain-vocab-size"),
        ({"remain_vocab_size": 500, "min_count": 3.0}, "give one of the two"),
        ({"coverage": 0.9}, "needs counts"),
        ({"coverage": 1.5}, "--coverage"),
        ({"keep_script": "Lattin"}, "did you mean Latin"),
        ({"keep": "/nowhere"}, "/nowhere is missing"),
        ({"keep_ids": "/nowhere"}, "/nowhere is missing"),
        ({"remain_vocab_size": 500, "prior": 2.0}, "--prior"),
        ({"remain_vocab_size": 500, "held_out": ("/nowhere",)}, "no file or folder /nowhere"),
        ({"remain_vocab_size": 500, "plan": "/nowhere"}, "give one of the two"),
        ({"plan": "/nowhere"}, "/nowhere is missing"),
    ],
)
def test_requests_that_cannot_be_met(model, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        trim(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_corpora_and_files_that_do_not_do(model, corpus, counts, plan, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    for name, said in (("blank.txt", "is empty"), ("missing.txt", "no file or folder")):
        with pytest.raises(InputError, match=said):
            count(model, tmp_path / name, tmp_path / "c")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        count(model, tmp_path / "binary.txt", tmp_path / "c")
    with pytest.raises(InputError, match="weights for all or for none"):
        count(model, [f"{corpus}:1", str(tmp_path / "blank.txt")], tmp_path / "c")
    with pytest.raises(InputError, match="exists"):
        count(model, corpus, counts)
    other = model_with(tmp_path / "other", lambda folder: byte_level(folder, size=650))
    with pytest.raises(InputError, match="another tokenizer"):
        trim(other, tmp_path / "out", counts, remain_vocab_size=500)
    with pytest.raises(PlanError, match="another tokenizer"):
        trim(other, tmp_path / "out", plan=str(plan))
    with pytest.raises(PlanError, match="another tokenizer"):
        by_prune_hf(other, tmp_path / "out", vocab_plan=str(plan))
    with pytest.raises(InputError, match="not the model's"):
        small = build_tiny(tmp_path / "small", vocab_size=600)
        shutil.copy(model / "tokenizer.json", small)
        trim(small, tmp_path / "out", remain_vocab_size=500)
    torch.save({"a": print}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="names .*print.*, which no checkpoint needs"):
        trim(model, tmp_path / "out", keep_ids=str(tmp_path / "evil.pt"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "c").exists()


def test_an_edited_plan_is_checked(model, plan, tmp_path):
    data = json.loads(plan.read_text())
    for change, said in (
        (lambda d: d["vocab"].pop(0), "the new shape says 480"),
        (lambda d: d["vocab"].reverse(), "ascending"),
        (lambda d: d.update(vocab=d["vocab"][1:] + [719]), "must stay"),
        (lambda d: d["vocab"].__setitem__(-1, 720), "out of range"),
    ):
        edited = json.loads(json.dumps(data))
        change(edited)
        (tmp_path / "plan.json").write_text(json.dumps(edited))
        with pytest.raises(PlanError, match=said):
            trim(model, tmp_path / "out", plan=str(tmp_path / "plan.json"))


def test_a_token_in_the_data_that_the_map_does_not_know(model, counts, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    out = trim(model, tmp_path / "t", counts, remain_vocab_size=SIZE)
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=numpy.uint16)
    builder.add_document(torch.tensor([5, 720]), [2])
    builder.finalize(str(tmp_path / "d.idx"))
    with pytest.raises(InputError, match="(?s)not made with the tokenizer.*token 720"):
        vocab_remap(VocabRemapOptions(input=str(tmp_path / "d"), save=str(tmp_path / "n"), map=str(out)), World())
    with pytest.raises(InputError, match="(?s)not made with this tokenizer.*token 720"):
        count(model, tmp_path / "d", tmp_path / "c")
    with pytest.raises(CheckpointError):
        vocab_remap(VocabRemapOptions(input=str(tmp_path / "d"), save=str(tmp_path / "n"), map=str(tmp_path)), World())
    assert not list(tmp_path.glob("n*"))


def test_the_verbs_on_the_command_line(model, counts, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["vocab", "select", "--load-dir", str(model), "--counts", str(counts), "--remain-vocab-size", "5"])
    assert ended.value.code == 2 and "at least" in capsys.readouterr().err
    main(["vocab", "select", "--load-dir", str(model), "--counts", str(counts), "--remain-vocab-size", "500"])
    assert "720 → 500" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["vocab", "nothing"])
    assert ended.value.code == 2


def test_a_subject_of_either_kind(model, tmp_path):
    assert open_with_vocabulary(str(model), World()).layout is None
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m"), target_tensor_parallel_size=2), World())
    found = open_with_vocabulary(str(tmp_path / "m"), World())
    assert found.layout.tensor == 2 and vocabulary_of(found).rows == ROWS
    shutil.rmtree(tmp_path / "m/release/hf")
    with pytest.raises(InputError, match="keeps no tokenizer"):
        vocabulary_of(open_with_vocabulary(str(tmp_path / "m"), World()))
    assert vocabulary_of(open_with_vocabulary(str(tmp_path / "m"), World(), tokenizer=str(model))).rows == ROWS


# ------------------------------------------------------------------------------------------------------------------- fold


@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_head_is_the_same_by_every_route(ranks, corpus, tmp_path, tied):
    source = model_with(tmp_path / "hf", dtype="float32", tie_word_embeddings=tied)
    asked = {"remain_vocab_size": SIZE, "fold": True, "data": (f"{corpus}:1",), "nsamples": 8, "seq_length": 32}
    expected = state_dict(trim(source, tmp_path / "out", **asked))
    sliced = state_dict(trim(source, tmp_path / "sliced", remain_vocab_size=SIZE))
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    for name, value in sliced.items():
        assert torch.equal(value, expected[name]) == (name != head)
    changed = (sliced[head] != expected[head]).any(dim=1)
    assert 20 < int(changed.sum()) < SIZE
    convert(ConvertOptions(load=str(source), save=str(tmp_path / "m")), World())
    for size, layout in ((2, 2), (3, 1)):
        checkpoint = tmp_path / f"m{size}"
        transfer(TransferOptions(load=str(tmp_path / "m"), save=str(checkpoint), target_tensor_parallel_size=layout), World())
        options = {"load": str(checkpoint), "save": str(tmp_path / f"t{size}"), **asked}
        ranks(size).run(rank_jobs.run_steps, ("vocab_trim", options))
        export(ExportOptions(load=str(tmp_path / f"t{size}"), save=str(tmp_path / f"back{size}")), World())
        found = state_dict(tmp_path / f"back{size}")
        torch.testing.assert_close(found[head], expected[head], rtol=1e-4, atol=2e-5)
        assert all(torch.equal(found[name], expected[name]) for name in expected if name != head)


def test_text_without_a_fold_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="--nsamples without --fold"):
        trim(model, tmp_path / "out", remain_vocab_size=500, nsamples=4)
    with pytest.raises(InputError, match="--fold and --tokenizer-only"):
        trim(model, tmp_path / "out", remain_vocab_size=500, fold=True, tokenizer_only=True)


# ------------------------------------------------------------------------------------------ what was once got wrong


def test_a_pair_of_another_tokenizer_is_not_renumbered(model, counts, corpus, tmp_path):
    out = trim(model, tmp_path / "t", counts, remain_vocab_size=SIZE)
    other = byte_level(tmp_path / "other", size=650)
    options = {"input": (str(corpus),), "tokenizer": str(other), "save": str(tmp_path / "o"), "workers": 1}
    preprocess(PreprocessOptions(**options), World())
    pair = str(tmp_path / "o_text_document")
    for path in (out, out / "vocab_map.npz"):
        with pytest.raises(InputError, match="(?s)not made with the tokenizer that was trimmed.*other"):
            vocab_remap(VocabRemapOptions(input=pair, save=str(tmp_path / "n"), map=str(path)), World())
    assert not list(tmp_path.glob("n*"))


def test_a_model_that_keeps_no_tokenizer_is_given_one_and_keeps_its_files(model, counts, tmp_path):
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m"), target_tensor_parallel_size=2), World())
    for file in (tmp_path / "m/release/hf").glob("*token*"):
        file.unlink()
    tokenizer = byte_level(tmp_path / "tok")
    named = {"tokenizer": str(tokenizer)}
    with pytest.raises(InputError, match="keeps no tokenizer"):
        trim(tmp_path / "m", tmp_path / "t", counts, remain_vocab_size=SIZE)
    trim(tmp_path / "m", tmp_path / "t", counts, remain_vocab_size=SIZE, **named)
    export(ExportOptions(load=str(tmp_path / "t"), save=str(tmp_path / "back")), World())
    expected = trim(model, tmp_path / "expected", counts, remain_vocab_size=SIZE)
    names = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "vocab_map.npz"]
    assert filecmp.cmpfiles(tmp_path / "back", expected, names, shallow=False) == (names, [], [])
    with pytest.raises(InputError, match="keeps its own"):
        trim(model, tmp_path / "x", counts, remain_vocab_size=SIZE, **named)
    with pytest.raises(InputError, match="is, holds or lies in the input"):
        trim(tmp_path / "m", tokenizer, counts, remain_vocab_size=SIZE, overwrite=True, **named)


def test_outputs_that_would_be_lost(model, counts, corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is the output .* or lies in it"):
        trim(model, out, counts, remain_vocab_size=SIZE, report=str(out / "report.json"))
    with pytest.raises(InputError, match="same file"):
        trim(model, out, counts, remain_vocab_size=SIZE, report=str(tmp_path / "a"), save_ids=str(tmp_path / "a"))
    with pytest.raises(InputError, match="same file"):
        count(model, corpus, tmp_path / "c", text=str(tmp_path / "c"))
    with pytest.raises(InputError, match="twice"):
        vocab_select(VocabSelectOptions(load=str(model), counts=(str(counts),) * 2, remain_vocab_size=SIZE), World())
    assert list(tmp_path.iterdir()) == []


def test_tokens_with_brackets_are_shown_as_they_are(model, counts, tmp_path, capsys):
    from megatron_prune.vocabulary import choice as vocabulary_choice

    chosen = vocabulary_choice.Chosen(trimmed=None, made_by={}, report={"tokens": {"before": 2, "after": 1}, "must_stay": {}})
    entry = [
        {"id": 1, "text": "[/", "made": 1.0},
        {"id": 2, "text": "x] [axis", "made": 1.0},
        {"id": 3, "text": "()]", "made": 1.0},
    ]
    chosen.report.update(bytes_without_a_token=[], least_frequent_kept=entry, most_frequent_dropped=[])
    vocabulary_choice.show(chosen)
    shown = capsys.readouterr().out
    assert "'[/' 1" in shown and "[axis' 1" in shown and "'()]' 1" in shown


def test_counts_of_a_model_serve_its_tokenizer_alone(model, counts, tmp_path):
    tokenizer = byte_level(tmp_path / "tok")
    out = trim(tokenizer, tmp_path / "out", counts, remain_vocab_size=SIZE)
    expected = trim(model, tmp_path / "expected", counts, remain_vocab_size=SIZE)
    assert (out / "tokenizer.json").read_bytes() == (expected / "tokenizer.json").read_bytes()


# --------------------------------------------------------------------------------------------------------------- --serve


def shared_by(ranks: int, tokens: int) -> bool:
    """Whether as many ranks share the rows, padded to 64s as vLLM pads them."""
    return (tokens + (-tokens % 64)) % ranks == 0


def chosen_size(model: Path, folder: Path, **options) -> int:
    plan = folder / "plan.json"
    plan.unlink(missing_ok=True)
    vocab_select(VocabSelectOptions(load=str(model), save_plan=str(plan), **options), World())
    return len(load_plan(plan).vocab)


@pytest.mark.parametrize("multiple", [None, 10])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_size_that_is_not_exact_is_the_next_that_can_be_served(model, counts, tmp_path, share, multiple):
    asked = {"counts": (str(counts),), "coverage": share, "multiple_of": multiple}
    plain, served = chosen_size(model, tmp_path, **asked), chosen_size(model, tmp_path, serve="vllm,tp=3", **asked)
    step = multiple or 1
    able = [size for size in range(plain, ROWS + 1, step) if shared_by(3, size)]
    assert served == able[0] >= plain and served % step == 0
    record = load_plan(tmp_path / "plan.json").vocab_record()
    assert record["serve"] == "vllm,tp=3"


@pytest.mark.parametrize("verb", ["select", "trim", "trim by a plan"])
def test_an_exact_size_that_cannot_be_served_is_refused_with_the_nearest(model, counts, tmp_path, verb):
    asked = {"counts": (str(counts),), "remain_vocab_size": SIZE}
    assert not shared_by(3, SIZE)
    below = max(size for size in range(SIZE) if shared_by(3, size))
    above = min(size for size in range(SIZE, ROWS + 1) if shared_by(3, size))
    if verb == "trim by a plan":
        chosen_size(model, tmp_path, **asked)
        asked = {"plan": str(tmp_path / "plan.json")}
    with pytest.raises(InputError, match=f"(?s)--serve: {SIZE} tokens.*tp=3: vocab_size {SIZE}.*{below} or {above} .the nearest"):
        if verb == "select":
            vocab_select(
                VocabSelectOptions(load=str(model), serve="tp=3", save_plan=str(tmp_path / "new.json"), **asked), World()
            )
        else:
            vocab_trim(VocabTrimOptions(load=str(model), save=str(tmp_path / "small"), serve="tp=3", **asked), World())
    assert not (tmp_path / "small").exists() and not (tmp_path / "new.json").exists()


def test_what_is_trimmed_for_a_place_is_served_there_and_pruned_by_the_same_words(model, counts, tmp_path):
    small = trim(model, tmp_path / "small", counts, min_count=3.0, serve="vllm,tp=3")
    size = json.loads((small / "config.json").read_text())["vocab_size"]
    assert shared_by(3, size) and state_dict(small)["model.embed_tokens.weight"].shape[0] == size
    chosen_size(model, tmp_path, counts=(str(counts),), remain_vocab_size=SIZE)
    cut = {"load": str(model), "save": str(tmp_path / "p"), "vocab_plan": str(tmp_path / "plan.json"), "serve": "tp=3"}
    with pytest.raises(
        InputError, match=f"(?s)tp=3: vocab_size {SIZE}.*choose the tokens again with megatron-prune vocab select"
    ):
        prune_hf(PruneHfOptions(**cut), World())


@pytest.mark.parametrize(
    "serve, said",
    [
        ("tp=5", "(?s)--serve: the requested shape.*num_attention_heads 12, which does not divide by 5"),
        ("tensorrt", "--serve tensorrt"),
        ("tp=", "--serve tp="),
    ],
)
def test_a_place_that_no_number_of_tokens_makes_do_is_refused_before_anything_is_counted(model, tmp_path, serve, said):
    asked = {"load": str(model), "remain_vocab_size": SIZE, "held_out": (str(tmp_path / "nowhere.txt"),)}
    with pytest.raises(InputError, match=said):
        vocab_select(VocabSelectOptions(serve=serve, **asked), World())


def test_a_tokenizer_alone_is_not_served(model, tmp_path):
    shutil.copytree(model, tmp_path / "t", ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    with pytest.raises(InputError, match="--serve\n  got: a tokenizer alone"):
        vocab_select(VocabSelectOptions(load=str(tmp_path / "t"), remain_vocab_size=SIZE, serve="tp=2"), World())
