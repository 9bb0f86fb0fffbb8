"""Stored bytes that changed are an error that names the tensor, in every verb that reads them; every verb checks what it wrote."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import rank_jobs
import rank_jobs_recovery as jobs
import recovery_reference as reference
import torch
from ranks import RankFailed
from safetensors.torch import load_file, save_file

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId, tensor_ids
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.manifest import FILE, RECIPE_FILE, Manifest
from megatron_prune.cli.main import main
from megatron_prune.files.region import Region
from megatron_prune.runtime.model import stop_parallel
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

KINDS = [("torch_dist", 1), ("torch_dist", 3), ("torch", 2)]
TEXT = "A small text for a small tokenizer, again and again. " * 60


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """Checkpoints of one model by kind, a plan ``plan.json``, a text ``text.txt`` and a pair ``pair``."""
    home = tmp_path_factory.mktemp("content")
    for ckpt_format, ranks in KINDS:
        layout = {"target_tensor_parallel_size": ranks, "ckpt_format": ckpt_format}
        save = str(home / f"{ckpt_format}-{ranks}")
        convert(ConvertOptions(load=str(tiny("qwen2")), save=save, no_check=True, **layout), World())
    (home / "text.txt").write_text(TEXT)
    reference.write_pair(home / "pair", reference.documents(40))
    words = f"prune --load {home}/torch_dist-1 --save {home}/cut --hidden-size-remain 40 --metric random"
    assert ended(words + f" --save-plan {home}/plan.json --no-check") == 0
    return home


def ended(words: str) -> int:
    """Exit code of a command."""
    try:
        main(words.split())
    except SystemExit as left:
        stop_parallel()  # what the end of the process does otherwise
        World().disconnect()
        return left.code
    return 0


@pytest.fixture
def fails(capsys):
    """``fails("export …", "pattern")``: it ends with an exit code that is not 0, and a message."""

    def check(words: str, *patterns: str, code: int = 2) -> None:
        capsys.readouterr()
        assert ended(words) == code, capsys.readouterr().err
        message = capsys.readouterr().err
        assert "Traceback" not in message
        for pattern in patterns:
            assert re.search(pattern, message, re.DOTALL), f"{pattern!r} is not in:\n{message}"

    return check


def flip(path: Path, at: int) -> None:
    """Change a bit of a byte of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


class Flipped:
    """A context in which a byte somewhere in the weights of a checkpoint is another one; ``tensor`` is whose."""

    def __init__(self, checkpoint: Path, draw: random.Random):
        tensors = megatron.open_checkpoint(checkpoint).tensors
        self.tensor = draw.choice(tensor_ids(tensors.config))
        region = draw.choice(tensors.tiles[self.tensor]).region
        self.path, self.at = region.path, region.offset + draw.randrange(region.nbytes)

    def __enter__(self):
        flip(self.path, self.at)
        return self

    def __exit__(self, *_):
        flip(self.path, self.at)


TP = "--tensor-model-parallel-size 1"
READERS = {
    "export": "export --load-dir {m} --save-dir {out}",
    "transfer": "transfer --load-dir {m} --save-dir {out} --target-params-dtype fp32",
    "prune by a plan": "prune --load {m} --save {out} --plan {home}/plan.json " + TP,
    "prune by scores": "prune --load {m} --save {out} --hidden-size-remain 40 --metric obs --data {home}/text.txt --nsamples 2 "
    "--seq-length 16 " + TP,
    "prune by weights": "prune --load {m} --save {out} --ffn-hidden-size-remain 60 --metric magnitude " + TP,
    "score": "score --load {m} --save {out} --data {home}/text.txt --nsamples 2 --seq-length 16 " + TP,
    "sample": "sample --load {m} --save {out}.safetensors --nsamples 1 --seq-length 8 " + TP,
    "evaluate": "evaluate --load-dir {m} --data {home}/text.txt --seq-length 16 --windows 1 " + TP,
    "verify": "verify --load-dir {m} --hf-dir {hf} " + TP,
    "recover": "recover --load {m} --save {out} --data-path {home}/pair --seq-length 16 --train-iters 1 --global-batch-size 2 "
    + TP,
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("verb", READERS)
def test_a_byte_that_changed_is_an_error_that_names_the_tensor(home, tiny, tmp_path, fails, verb, kind):
    checkpoint = home / "{}-{}".format(*kind)
    words = READERS[verb].format(m=checkpoint, home=home, out=tmp_path / "out", hf=tiny("qwen2"))
    with Flipped(checkpoint, random.Random(f"{verb} {kind}")) as flipped:
        fails(words, rf"{re.escape(str(flipped.path))}: {flipped.tensor} is not what was written")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out.partial"))


def test_every_rank_says_so_where_one_of_them_reads_the_damaged_part(home, ranks):
    checkpoint = home / "torch_dist-1"
    tensors = megatron.open_checkpoint(checkpoint).tensors
    region = tensors.tiles[TensorId("gate", 3)][0].region
    flip(region.path, region.offset)  # the first rows: of rank 0 alone
    try:
        found = ranks(2).run(rank_jobs.refusal, str(checkpoint), ParallelLayout(tensor=2))
    finally:
        flip(region.path, region.offset)
    assert found[0] == found[1] and "layer 3 gate" in found[0]


@pytest.mark.parametrize("metric", ["activation", "magnitude"])
def test_every_rank_says_so_where_layers_are_read_one_by_one(home, ranks, tmp_path, metric):
    checkpoint, pool = home / "torch_dist-1", ranks(2)
    region = megatron.open_checkpoint(checkpoint).tensors.tiles[TensorId("up", 2)][0].region
    step = {"load": str(checkpoint), "save": str(tmp_path / "out"), "ffn_hidden_size_remain": 64, "metric": metric}
    step |= {"tensor_model_parallel_size": 2}
    step |= {"data": (str(home / "text.txt"),), "nsamples": 2, "seq_length": 16} if metric == "activation" else {}
    flip(region.path, region.offset + region.nbytes - 1)  # the last row: of rank 1 alone
    try:
        with pytest.raises(RankFailed, match="layer 2 up is not what was written") as failed:
            pool.run(rank_jobs.run_steps, ("prune", step))
    finally:
        flip(region.path, region.offset + region.nbytes - 1)
        pool.run(rank_jobs.stop)
    assert failed.value.kinds == {0: "DamagedTensor", 1: "DamagedTensor"} and pool.alive


# ------------------------------------------------------------------------------------------------------- files as wholes


def exchange(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


@pytest.mark.parametrize(
    "kind, one, other",
    [
        (("torch", 2), "mp_rank_00", "mp_rank_01"),
        (("torch_dist", 3), "__0_0.distcp", "__1_0.distcp"),
        (("torch_dist", 3), "__1_0.distcp", "__2_0.distcp"),
    ],
)
def test_exchanged_files_are_an_error(home, tmp_path, fails, kind, one, other):
    folder = Path(shutil.copytree(home / "{}-{}".format(*kind), tmp_path / "m")) / "release"
    exchange(folder / one, folder / other)
    fails(f"export --load-dir {tmp_path}/m --save-dir {tmp_path}/out", str(folder))


def test_a_file_of_another_checkpoint_in_its_place_is_an_error(home, tiny, tmp_path, fails):
    for ckpt_format, ranks, name in (("torch_dist", 1, "__0_0.distcp"), ("torch", 2, "mp_rank_01/model_optim_rng.pt")):
        other = {"save": str(tmp_path / f"other-{ckpt_format}"), "ckpt_format": ckpt_format, "no_check": True}
        source = str(tiny("qwen2", seed=9))
        convert(ConvertOptions(load=source, target_tensor_parallel_size=ranks, **other), World())
        m = Path(shutil.copytree(home / f"{ckpt_format}-{ranks}", tmp_path / ckpt_format))
        shutil.copyfile(tmp_path / f"other-{ckpt_format}/release" / name, m / "release" / name)
        fails(f"export --load-dir {m} --save-dir {tmp_path}/out", f"{name}: .* is not what was written")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_byte_of_the_files_that_say_what_lies_where_is_an_error(home, tmp_path, fails, name):
    m = Path(shutil.copytree(home / "torch_dist-1", tmp_path / "m"))
    draw, size = random.Random(name), (m / "release" / name).stat().st_size
    for at in (draw.randrange(size) for _ in range(6)):
        flip(m / "release" / name, at)
        fails(f"export --load-dir {m} --save-dir {tmp_path}/out", re.escape(str(m)))
        flip(m / "release" / name, at)


def test_a_copy_that_nobody_reads_is_compared_by_inspect(home, tmp_path, capsys):
    checkpoint = home / "torch-2"
    tensors = megatron.open_checkpoint(checkpoint).tensors
    region = tensors.replicas[TensorId("post_norm", 2)][0].region
    assert ended(f"inspect {checkpoint} --weights --json") == 0
    flip(region.path, region.offset + 5)
    capsys.readouterr()
    assert ended(f"inspect {checkpoint} --weights --json") == 1
    flip(region.path, region.offset + 5)
    assert list(json.loads(capsys.readouterr().out)["changed_weights"]) == ["layer 2 post_norm"]


def test_inspect_names_every_tensor_and_file_that_changed(home, tmp_path, capsys):
    m = Path(shutil.copytree(home / "torch_dist-3", tmp_path / "m"))
    tensors = megatron.open_checkpoint(m).tensors
    changed = [TensorId("embedding"), TensorId("k", 1), TensorId("final_norm")]
    for tensor in changed:
        flip(tensors.tiles[tensor][0].region.path, tensors.tiles[tensor][0].region.offset + 3)
    (m / "release/hf/generation_config.json").write_text("{}")
    (m / "release/hf/tokenizer.json").unlink()
    capsys.readouterr()
    assert ended(f"inspect {m} --weights --json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert sorted(facts["changed_weights"]) == sorted(map(str, changed))
    assert sorted(facts["changed_files"]) == ["hf/generation_config.json", "hf/tokenizer.json"]


# ---------------------------------------------------------------------------------------------------------- earlier versions


def of_version_1(folder: Path) -> None:
    """Make a manifest one of the version that kept no digests."""
    data = json.loads((folder / FILE).read_text())
    data.update(version=1)
    del data["digests"], data["files"]
    (folder / FILE).write_text(json.dumps(data))


def test_a_manifest_without_digests_is_read_and_the_whole_is_compared(home, tiny, tmp_path, fails, capsys):
    m = Path(shutil.copytree(home / "torch_dist-1", tmp_path / "m"))
    of_version_1(m / "release")
    assert ended(f"export --load-dir {m} --save-dir {tmp_path}/back") == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tiny("qwen2") / "model.safetensors").read_bytes()
    assert ended(f"transfer --load-dir {m} --save-dir {tmp_path}/again") == 0
    again, before = (Manifest.load(folder / "release" / FILE) for folder in (tmp_path / "again", home / "torch_dist-1"))
    assert (again.digests, again.content_id) == (before.digests, before.content_id)
    with Flipped(m, random.Random(5)):
        fails(f"export --load-dir {m} --save-dir {tmp_path}/out", "content id is another.*none can be named")
        fails(f"transfer --load-dir {m} --save-dir {tmp_path}/out", "content id is another.*none can be named")
        assert ended(f"inspect {m} --weights --json") == 1
    assert ended(f"inspect {m} --weights --json") == 0


def test_what_cannot_be_compared_is_read(home, tmp_path):
    for name, words in {
        "wide": f"transfer --load-dir {home}/torch_dist-1 --target-params-dtype fp32",
        "pruned": f"prune --load {home}/torch_dist-1 --plan {home}/plan.json",
    }.items():
        assert ended(f"{words} --save{'-dir' if name == 'wide' else ''} {tmp_path}/{name} --no-check") == 0
        of_version_1(tmp_path / name / "release")
        assert ended(f"export --load-dir {tmp_path}/{name} --save-dir {tmp_path}/{name}-hf --no-check") == 0


# ------------------------------------------------------------------------------------------------------ files beside weights


def test_an_edited_side_file_is_a_warning_and_a_changed_tokenizer_an_error_of_verify(home, tiny, tmp_path, fails, capsys):
    m = Path(shutil.copytree(home / "torch_dist-1", tmp_path / "m"))
    verify = f"verify --load-dir {m} --hf-dir {tiny('qwen2')}"
    assert ended(verify) == 0 and "edited" not in capsys.readouterr().err
    (m / "release/hf/generation_config.json").write_text('{"temperature": 0.5}')
    assert ended(f"export --load-dir {m} --save-dir {tmp_path}/out") == 0
    assert re.search(r"edited or removed since it was written, and used so: hf/generation_config.json", capsys.readouterr().err)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"temperature": 0.5}
    assert ended(verify) == 0 and "generation_config.json: edited" in capsys.readouterr().err
    flip(m / "release/hf/tokenizer.json", 40)
    fails(verify, r"ERROR: .*tokenizer.json: edited", code=1)
    again = f"preprocess --input {home}/text.txt --tokenizer {m} --output-prefix {tmp_path}/pair --workers 1"
    ended(again)
    assert "hf/tokenizer.json" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_that_of_the_directory_is_an_error_of_verify(home, tiny, tmp_path, fails):
    hf = Path(shutil.copytree(tiny("qwen2"), tmp_path / "hf"))
    content = json.loads((hf / "tokenizer.json").read_text())
    (hf / "tokenizer.json").write_text(json.dumps(content, indent=1))
    fails(f"verify --load-dir {home}/torch_dist-1 --hf-dir {hf}", "tokenizer.json: not that of", code=1)


def test_a_file_that_says_the_same_for_both_versions_of_transformers_is_no_other(home, tmp_path, capsys):
    assert ended(f"export --load-dir {home}/cut --save-dir {tmp_path}/hf") == 0
    written = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({**written, "tokenizer_class": "TokenizersBackend"}))
    verify = f"verify --load-dir {home}/cut --hf-dir {tmp_path}/hf"
    assert ended(verify) == 0 and "not that of" not in capsys.readouterr().err
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({**written, "eos_token": "<other>"}))
    assert ended(verify) == 0 and "tokenizer_config.json: not that of" in capsys.readouterr().err
    (tmp_path / "hf/generation_config.json").write_text("[")
    ended(verify)
    assert "generation_config.json: not that of" in capsys.readouterr().err


def test_a_pruned_hugging_face_directory_keeps_digests_of_its_weights(home, tmp_path, fails):
    assert ended(f"export --load-dir {home}/cut --save-dir {tmp_path}/hf") == 0
    assert ended(f"convert --load-dir {tmp_path}/hf --save-dir {tmp_path}/m") == 0
    size = (tmp_path / "hf/model.safetensors").stat().st_size
    flip(tmp_path / "hf/model.safetensors", size - 5)
    words = f"convert --load-dir {tmp_path}/hf --save-dir {tmp_path}/n"
    fails(words, "model.safetensors: .* is not what was written")
    recipe = json.loads((tmp_path / "hf" / RECIPE_FILE).read_text())
    del recipe["digests"]
    (tmp_path / "hf" / RECIPE_FILE).write_text(json.dumps(recipe))
    assert ended(words) == 0


# ------------------------------------------------------------------------------------------------------------------ recover


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """Runs of two steps, of the model (``run``) and of an adapter (``lora``)."""
    home = tmp_path_factory.mktemp("trained")
    convert(ConvertOptions(load=str(tiny("llama", num_hidden_layers=2)), save=str(home / "m")), World())
    reference.write_pair(home / "text", reference.documents(40))
    common = {"load": str(home / "m"), "data_path": (str(home / "text"),), "split": "80,10,10", "seq_length": 16, "eval_iters": 1}
    common |= {"train_iters": 2, "global_batch_size": 2, "micro_batch_size": 2, "save_interval": 1, "lr": 1e-3}
    for name, more in {"run": {}, "lora": {"lora_r": 2, "lora_alpha": 4.0}}.items():
        assert jobs.recover(World(), {**common, "save": str(home / name), **more}) == 0
    return home


def test_the_weights_of_a_recovery_have_digests(trained, tmp_path, fails):
    folder = trained / "run/iter_0000002"
    assert ended(f"inspect {folder} --weights") == 0
    words = f"export --load-dir {folder} --save-dir {tmp_path}/out"
    with Flipped(folder, random.Random(1)) as flipped:
        fails(words, f"{flipped.tensor} is not what was written")
        again = f"recover --load {trained}/m --save {trained}/run --data-path {trained}/text --split 80,10,10 --seq-length 16 "
        again += "--train-iters 2 --global-batch-size 2 --micro-batch-size 2 --save-interval 1 --eval-iters 1 --lr 1e-3"
        fails(again, f"{flipped.tensor} is not what was written")
    assert ended(words) == 0


def test_the_matrices_of_an_adapter_have_digests(trained, tmp_path, fails):
    run = Path(shutil.copytree(trained / "lora", tmp_path / "lora"))
    described = Manifest.load(run / "iter_0000002" / FILE)
    assert set(described.digests) >= {"adapter.layers.1.q.a", "adapter.layers.1.q.b"}
    name = "adapter.layers.1.q.b"
    altered = {**described.digests, name: "0" * 16}
    (run / "iter_0000002" / FILE).write_text(described.dumps().replace(described.digests[name], altered[name]))
    for words in ("--adapter-only", ""):
        fails(f"export --load-dir {run} --save-dir {tmp_path}/out {words}", f"{re.escape(name)} is not what was written")


# ------------------------------------------------------------------------------------------------- what was written is checked

WRITERS = {
    "convert": "convert --load-dir {hf} --save-dir {out}",
    "transfer": "transfer --load-dir {home}/torch_dist-1 --save-dir {out}",
    "export": "export --load-dir {home}/torch_dist-3 --save-dir {out}",
    "prune": "prune --load {home}/torch_dist-1 --save {out} --plan {home}/plan.json",
    "vocab trim": "vocab trim --load-dir {home}/torch_dist-1 --remain-vocab-size 290 --save-dir {out}",
    "prune-hf": "prune-hf --model-name-or-path {hf} --output-path {out} --ffn-hidden-size-remain 60 --metric random",
}


@pytest.mark.parametrize("verb", WRITERS)
def test_what_was_written_is_checked_before_it_is_put_in_place(home, tiny, tmp_path, fails, capsys, monkeypatch, verb):
    words = WRITERS[verb].format(home=home, hf=tiny("qwen2"), out=tmp_path / "out")
    assert ended(words) == 0
    told = capsys.readouterr().err
    assert len(re.findall("INFO: checked: ", told)) == 1
    shutil.rmtree(tmp_path / "out")
    written = Region.write_from

    def lossy(region: Region, data: torch.Tensor) -> None:
        if "out" in str(region.path) and data.numel() > 4000 and data.dim() == 2:
            data = data.clone()
            data[-1, -1] += 1
        written(region, data)

    monkeypatch.setattr(Region, "write_from", lossy)
    fails(words, "check of what was written failed.*is not what was written", code=1)
    assert list(tmp_path.iterdir()) == []
    assert ended(words + " --no-check") == 0 and (tmp_path / "out").is_dir()


def test_a_directory_that_transformers_reads_otherwise_is_not_put_in_place(home, tmp_path, fails, monkeypatch):
    from megatron_prune.evaluation import one_layer

    assert one_layer.check_in_transformers(huggingface.open_model(exported(home, tmp_path))) == ("Qwen2ForCausalLM", [])
    real = one_layer._small
    monkeypatch.setattr(one_layer, "_small", lambda *given: {**real(*given), "rms_norm_eps": float("nan")})
    fails(f"export --load-dir {home}/torch-2 --save-dir {tmp_path}/out", "layer 0 computes NaN", code=1)
    monkeypatch.setattr(one_layer, "_small", lambda *given: {**real(*given), "hidden_act": "none at all"})
    fails(f"export --load-dir {home}/torch-2 --save-dir {tmp_path}/out", "transformers cannot run it.*none at all", code=1)
    assert not (tmp_path / "out").exists()


def exported(home: Path, tmp_path: Path) -> Path:
    assert ended(f"export --load-dir {home}/torch-2 --save-dir {tmp_path}/hf --no-check") == 0
    return tmp_path / "hf"


def test_parameters_that_the_class_does_not_have_are_named(home, tmp_path):
    from megatron_prune.evaluation.one_layer import check_in_transformers

    model = huggingface.open_model(exported(home, tmp_path))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "intermediate_size": 60}))
    _, problems = check_in_transformers(model)
    assert len(problems) == 12 and "down_proj.weight: Qwen2ForCausalLM wants (48, 60), the file holds (48, 96)" in problems[0]


# -------------------------------------------------------------------------------------------------------------- element types


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_that_are_no_floating_point_numbers_are_refused(tiny, tmp_path, fails, kind, dtype):
    hf = Path(shutil.copytree(tiny("qwen2"), tmp_path / "hf"))
    weights = load_file(hf / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    if kind == "bin":
        (hf / "model.safetensors").unlink()
        torch.save(weights, hf / "pytorch_model.bin")
    else:
        save_file(weights, hf / "model.safetensors")
    for words in (f"convert --load-dir {hf} --save-dir {tmp_path}/out", f"inspect {hf}"):
        fails(words, "layers.2.mlp.up_proj")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_megatron_weights_that_are_no_floating_point_numbers_are_refused(home, tmp_path, fails, dtype):
    m = Path(shutil.copytree(home / "torch-2", tmp_path / "m"))
    for file in (m / "release").glob("mp_rank_*/model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        name = "decoder.layers.1.mlp.linear_fc2.weight"
        content["model"][name] = content["model"][name].to(dtype)
        torch.save(content, file)
    fails(f"export --load-dir {m} --save-dir {tmp_path}/out", "layer 1 down: holds " + str(dtype).removeprefix("torch."))
