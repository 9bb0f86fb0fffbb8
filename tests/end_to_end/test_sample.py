"""`megatron-prune sample`: the model's own text as a file that --data takes."""

from __future__ import annotations

import pytest
import torch
from tiny import build_tiny

from megatron_prune.cli.main import main
from megatron_prune.text.artifact import load_samples


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("sample")
    build_tiny(home / "hf", "llama", dtype="float32")
    main(["convert", "--load-dir", str(home / "hf"), "--save-dir", str(home / "megatron")])
    return home / "megatron"


def words(verb: str, checkpoint, save, *more: object) -> list[str]:
    return [verb, "--load", str(checkpoint), "--save", str(save), "--nsamples", "4", "--seq-length", "24", *map(str, more)]


def test_samples_are_what_prune_would_have_made_itself(checkpoint, tmp_path):
    samples = tmp_path / "own.safetensors"
    main(words("sample", checkpoint, samples))
    tokens, facts = load_samples(samples)
    assert tokens.shape == (4, 24) and (tokens[:, 0] == 0).all() and facts["bos"] == 0
    cut = ["--ffn_hidden_size_remain", 64, "--save_plan"]
    main(words("prune", checkpoint, tmp_path / "kept", *cut, tmp_path / "kept.json", "--data", samples))
    main(words("prune", checkpoint, tmp_path / "made", *cut, tmp_path / "made.json"))
    units = [
        [line for line in (tmp_path / name).read_text().split("\n") if line.strip().startswith('"ffn":')]
        for name in ("kept.json", "made.json")
    ]
    assert units[0] == units[1] and len(units[0]) == 4


def test_a_seed_that_numpy_does_not_take_is_refused(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(words("sample", checkpoint, tmp_path / "own.safetensors", "--seed", -1))
    assert left.value.code == 2 and "--seed" in capsys.readouterr().err


def test_the_seed_decides(checkpoint, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(words("sample", checkpoint, tmp_path / f"{name}.safetensors", "--seed", seed))
    a, b, c = (load_samples(tmp_path / f"{name}.safetensors")[0] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "more, message",
    [(["--seq-length", 65], "at most the model's 64"), (["--nsamples", 0], "positive"), (["--save", "own.bin"], "safetensors")],
)
def test_bad_input(checkpoint, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        main(words("sample", checkpoint, tmp_path / "own.safetensors", *more))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
