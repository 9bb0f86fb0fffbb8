"""What a teacher leaves of its distributions: the numbers beside transformers, at any layout, stopped and gone on; and what a
recovery refuses of it. ``tests/distributed/test_recover.py`` trains from it beside a dense reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest
import rank_jobs_recovery as jobs
import recovery_reference as reference
import torch
from ranks import RankFailed
from safetensors.torch import load_file, save_file

from megatron_prune.errors import InputError
from megatron_prune.recovery import stored_logits
from megatron_prune.recovery.trainer import TrainingError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

LENGTH, BATCH, STEPS, K, TEMPERATURE, SPLIT, SEED = 16, 12, 6, 9, 1.5, "80,10,10", 3
SAMPLES = BATCH * STEPS
"""More than one file's."""


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Path:
    """A teacher ``hf`` and ``m``, a smaller student ``s``, one of another vocabulary ``other``, and a pair ``text``."""
    home = tmp_path_factory.mktemp("home")
    models = {"m": {}, "s": {"intermediate_size": 48}, "other": {"vocab_size": 400}}
    for name, changes in models.items():
        source = tiny("llama", dtype="float32", num_hidden_layers=2, num_key_value_heads=6, **changes)
        convert(ConvertOptions(load=str(source), save=str(home / name)), World())
        if name == "m":
            (home / "hf").symlink_to(source)
    reference.write_pair(home / "text", reference.documents(60))
    return home


def lesson(home: Path, save: Path, **changes) -> dict[str, Any]:
    common = {"load": str(home / "m"), "save": str(save), "data_path": (str(home / "text"),), "split": SPLIT, "seed": SEED}
    common |= {"train_iters": STEPS, "global_batch_size": BATCH, "seq_length": LENGTH, "eval_iters": 1}
    return {**common, "top_k": K, "distill_temperature": TEMPERATURE, "micro_batch_size": 7, **changes}


def recovery(home: Path, save: Path, taught: Path, **changes) -> dict[str, Any]:
    same = lesson(home, save)
    for name in ("top_k", "micro_batch_size", "load"):
        del same[name]
    common = {"load": str(home / "s"), "teacher_logits": str(taught), "micro_batch_size": 6, "lr": 3e-3, "save_interval": 2}
    return {**same, **common, "log_interval": 1, **changes}


@pytest.fixture(scope="module")
def taught(home, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("taught") / "t"
    jobs.teach(World(), lesson(home, save))
    return save


@pytest.fixture(scope="module")
def drawn(home) -> torch.Tensor:
    counts = (SAMPLES, BATCH, BATCH)
    return reference.samples(([str(home / "text")], None), SPLIT, seq_length=LENGTH, seed=SEED, counts=counts)[0]


def answers(save: Path) -> dict[str, torch.Tensor]:
    """Of all samples."""
    parts = [load_file(path) for path in sorted(save.glob("part_*.safetensors"))]
    assert [len(part["ids"]) for part in parts] == [stored_logits.PART, SAMPLES - stored_logits.PART]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_ids_and_probabilities_are_those_of_transformers(home, taught, drawn):
    with torch.no_grad():
        logits = reference.load(home / "hf")(drawn[:, :-1]).logits.double()
    wanted, ids = (logits / TEMPERATURE).log_softmax(-1).topk(K, dim=-1)
    found = answers(taught)
    assert (found["ids"].dtype, found["log_probs"].dtype, found["rest"].dtype) == (torch.int32, torch.float16, torch.float32)
    assert torch.equal(found["ids"].long(), ids)
    torch.testing.assert_close(found["log_probs"].double(), wanted, rtol=2**-11 * 1.01, atol=0.0)  # half a step of float16
    torch.testing.assert_close(found["rest"].double(), 1 - wanted.exp().sum(-1), rtol=0.0, atol=1e-6)
    assert 0.1 < found["rest"].mean() < 0.9
    described = json.loads((taught / "teacher.json").read_text())
    assert (described["vocab_size"], described["top_k"]) == (307, K)
    assert sorted(path.name for path in taught.iterdir()) == ["part_00000.safetensors", "part_00001.safetensors", "teacher.json"]


@pytest.mark.parametrize("tp, pp, dp", [(3, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_a_teacher_says_the_same_at_every_layout(home, taught, ranks, tmp_path, tp, pp, dp):
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    ranks(tp * pp * dp).run(jobs.teach, lesson(home, tmp_path / "t", **sizes))
    one, many = answers(taught), answers(tmp_path / "t")
    assert torch.equal(one["ids"], many["ids"]) and torch.equal(one["digests"], many["digests"])
    torch.testing.assert_close(one["log_probs"], many["log_probs"], rtol=2**-10, atol=0.0)  # one step of float16
    torch.testing.assert_close(one["rest"], many["rest"], rtol=0.0, atol=1e-6)


def test_a_stopped_lesson_goes_on_and_another_does_not_take_over_its_files(home, taught, tmp_path, monkeypatch):
    write, written = stored_logits.write_part, []

    def stopped(path, *rest):
        if written:
            raise KeyboardInterrupt
        write(path, *rest)
        written.append(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored_logits, "write_part", stopped)
        jobs.teach(World(), lesson(home, tmp_path / "t"))
    assert not (tmp_path / "t").exists() and written[0].is_file()
    again: list[Path] = []
    monkeypatch.setattr(stored_logits, "write_part", lambda path, *rest: (again.append(path), write(path, *rest)))
    jobs.teach(World(), lesson(home, tmp_path / "t"))
    assert [path.name for path in again] == ["part_00001.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    for path in taught.iterdir():
        assert (tmp_path / "t" / path.name).read_bytes() == path.read_bytes()
    written.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored_logits, "write_part", stopped)
        jobs.teach(World(), lesson(home, tmp_path / "u", seed=4))
    again.clear()
    jobs.teach(World(), lesson(home, tmp_path / "u"))
    assert len(again) == 2 and (tmp_path / "u" / again[0].name).read_bytes() == (taught / again[0].name).read_bytes()


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(home, taught, tmp_path):
    assert jobs.recover(World(), recovery(home, tmp_path / "whole", taught)) == 0
    assert jobs.recover(World(), recovery(home, tmp_path / "run", taught), {3: "stop"}) == 143
    assert jobs.recover(World(), recovery(home, tmp_path / "run", taught)) == 0
    whole, found = jobs.course(tmp_path / "whole"), jobs.course(tmp_path / "run")
    assert whole.items() <= found.items() and len(whole) == STEPS + 4


LESSONS = {
    "more tokens than there are": ({"top_k": 308}, "--top-k.*308.*307"),
    "no tokens": ({"top_k": 0}, "--top-k.*0"),
    "a temperature of zero": ({"distill_temperature": 0.0}, "--distill-temperature"),
    "longer than the context": ({"seq_length": 65}, "--seq-length.*65.*64"),
    "no steps": ({"train_iters": 0}, "--train-iters.*0"),
    "data that is not there": ({"data_path": ("gone",)}, "gone.bin"),
    "no data": ({"data_path": ()}, "--data-path"),
    "no such checkpoint": ({"load": "nothing"}, "nothing"),
    "more ranks than there are": ({"tensor_model_parallel_size": 2}, "1 process for TP 2"),
    "a place inside the checkpoint": ({"save": "m/taught"}, "in the input"),
    "a seed below zero": ({"seed": -1}, "--seed"),
    "a blend that is not used": (
        {"valid_data_path": ("gone",)},
        "--valid-data-path gone has no effect without --train-data-path",
    ),
    "a split of what is not cut": (
        {"data_path": (), "train_data_path": ("text",), "valid_data_path": ("text",)},
        "--split 80,10,10 has no effect without --data-path",
    ),
    "more than there is room for": ({"train_iters": 10**9}, "not enough room.*GB free"),
}


@pytest.mark.parametrize("what", LESSONS)
def test_a_bad_lesson_is_refused_before_anything_is_written(home, tmp_path, monkeypatch, what):
    monkeypatch.chdir(home)
    changes, pattern = LESSONS[what]
    before = sorted(str(path) for path in home.rglob("*"))
    with pytest.raises(InputError, match=f"(?s){pattern}"):
        jobs.teach(World(), lesson(home, **{"save": tmp_path / "t", **changes}))
    assert list(tmp_path.iterdir()) == []
    assert sorted(str(path) for path in home.rglob("*")) == before


UNTAUGHT = {
    "other data": ({"split": "70,20,10"}, "--split 70,20,10, taught with 80,10,10"),
    "another seed": ({"seed": 9}, "--seed 9, taught with 3"),
    "more steps": ({"train_iters": 7}, "--train-iters 7, taught with 6"),
    "another length": ({"seq_length": 12}, "--seq-length 12, taught with 16"),
    "another temperature": ({"distill_temperature": 1.0}, "--distill-temperature 1.0, taught with 1.5"),
    "a student of another vocabulary": ({"load": "other"}, "--teacher-logits.*307.*400"),
    "a running teacher too": ({"teacher": "m"}, "--teacher and --teacher-logits"),
    "layers of nobody": ({"hidden_weight": 1.0}, "--hidden-weight without --teacher"),
    "no such place": ({"teacher_logits": "nowhere"}, "nowhere.*megatron-prune teach"),
}


@pytest.mark.parametrize("what", UNTAUGHT)
def test_a_recovery_that_was_not_taught_for_is_refused_by_name(home, taught, tmp_path, monkeypatch, what):
    monkeypatch.chdir(home)
    changes, pattern = UNTAUGHT[what]
    with pytest.raises(InputError, match=f"(?s){pattern}"):
        jobs.recover(World(), recovery(home, tmp_path / "run", taught, **changes))
    assert not (tmp_path / "run").exists()


def damage(taught: Path, what: str) -> None:
    part = taught / "part_00001.safetensors"
    if what == "gone":
        part.unlink()
    elif what == "cut short":
        part.write_bytes(part.read_bytes()[:-10])
    elif what == "no safetensors":
        part.write_bytes(b"\x80\x04 a pickle")
    elif what == "fewer samples":
        save_file({name: value[1:].contiguous() for name, value in load_file(part).items()}, part)
    elif what == "ids without a shape":
        save_file({**load_file(part), "ids": torch.tensor(5, dtype=torch.int32)}, part)
    elif what == "without the rest":
        save_file({name: value for name, value in load_file(part).items() if name != "rest"}, part)
    elif what == "no description":
        (taught / "teacher.json").unlink()
    elif what == "a damaged description":
        (taught / "teacher.json").write_text('{"vocab_size": 307}')


@pytest.fixture()
def copied(taught, tmp_path) -> Path:
    (tmp_path / "taught").mkdir()
    for path in taught.iterdir():
        (tmp_path / "taught" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "taught"


@pytest.mark.parametrize(
    "what, said",
    [
        ("gone", "part_00001.safetensors is missing or damaged"),
        ("cut short", "part_00001.safetensors is missing or damaged"),
        ("no safetensors", "part_00001.safetensors is missing or damaged"),
        ("fewer samples", "part_00001.safetensors is damaged.*7.*8"),
        ("ids without a shape", "part_00001.safetensors is damaged"),
        ("without the rest", "part_00001.safetensors is missing or damaged"),
        ("no description", "holds no teacher's answers"),
        ("a damaged description", "teacher.json: teacher.*teach again"),
    ],
)
def test_damaged_answers_are_refused_before_anything_is_written(home, copied, tmp_path, what, said):
    damage(copied, what)
    with pytest.raises(InputError, match=f"(?s){said}"):
        jobs.recover(World(), recovery(home, tmp_path / "run", copied))
    assert not (tmp_path / "run").exists()


def test_damaged_answers_are_refused_on_every_rank(home, copied, ranks, tmp_path):
    damage(copied, "gone")
    with pytest.raises(RankFailed, match="part_00001.safetensors") as failed:
        ranks(2).run(jobs.recover, recovery(home, tmp_path / "run", copied, pipeline_model_parallel_size=2))
    assert set(failed.value.kinds.values()) == {"InputError"} and len(failed.value.kinds) == 2


def edit(part: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(part)
    change(tensors)
    save_file(tensors, part)
    stored_logits._opened.cache_clear()


UNSOUND = {
    "other tokens": (lambda part: part["digests"][5].add_(1), f"other tokens than sample {stored_logits.PART + 5} "),
    "a token beyond the vocabulary": (lambda part: part["ids"][3, 2, 1].fill_(307), "token 307 of a vocabulary of 307"),
    "a token below zero": (lambda part: part["ids"][3, 2, 1].fill_(-1), "token -1 of"),
    "no number": (lambda part: part["log_probs"][7, 15, 8].fill_(torch.nan), "log-probability that is above 0 or none"),
    "no probability": (lambda part: part["log_probs"][0, 0, 0].fill_(0.5), "log-probability that is above 0 or none"),
    "nothing left": (lambda part: part["log_probs"][0, 0, 0].fill_(-torch.inf), "log-probability that is above 0 or none"),
    "certain of everything": (lambda part: part["log_probs"][1].fill_(0.0), "do not add up to 1"),
    "a rest that is no number": (lambda part: part["rest"][2, 2].fill_(torch.nan), "do not add up to 1"),
    "another dtype": (lambda part: part.update(ids=part["ids"].long()), "is damaged.*I64"),
    "no tokens": (lambda part: part.update({name: part[name][..., :0] for name in ("ids", "log_probs")}), "is damaged"),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_unsound_answers_are_refused_before_anything_is_written(home, copied, tmp_path, what):
    """Of which one number is wrong, as where the data was written anew under the same name."""
    change, said = UNSOUND[what]
    edit(copied / "part_00001.safetensors", change)
    with pytest.raises(InputError, match=f"(?s)part_00001.*{said}"):
        jobs.recover(World(), recovery(home, tmp_path / "run", copied))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["other tokens", "a token beyond the vocabulary"])
def test_answers_that_change_while_a_run_is_under_way_end_it_when_they_are_used(home, copied, tmp_path, monkeypatch, what):
    from megatron_prune.recovery import check as recovery_check

    monkeypatch.setattr(recovery_check, "check_answers", lambda *_: edit(copied / "part_00001.safetensors", UNSOUND[what][0]))
    with pytest.raises(TrainingError, match="part_00001.safetensors, sample [0-9]+: it "):
        jobs.recover(World(), recovery(home, tmp_path / "run", copied))
    assert (tmp_path / "run" / "iter_0000002").is_dir()  # what was trained before is kept


def test_of_long_answers_a_share_is_read_before_a_run(tmp_path, monkeypatch):
    """Of nine files three fit: the first, the one in the middle and the last, and what is wrong in another waits for its use."""
    tokens = torch.arange(9 * stored_logits.PART).unsqueeze(-1)
    dataset = [{"tokens": row} for row in tokens]
    for part, rows in enumerate(tokens.split(stored_logits.PART)):
        ids = torch.full((len(rows), 1, 1), 5 if part in (0, 4, 8) else 99, dtype=torch.int32)
        stored_logits.write_part(
            stored_logits.part_path(tmp_path, part), ids, torch.zeros_like(ids).half(), torch.zeros(len(rows), 1), rows
        )
    check = lambda: stored_logits.check_answers(tmp_path, len(tokens), 50, dataset)
    with pytest.raises(InputError, match="(?s)part_00001.*token 99"):
        check()
    monkeypatch.setattr(stored_logits, "CHECKED", 3 * stored_logits.part_path(tmp_path, 0).stat().st_size)
    check()
