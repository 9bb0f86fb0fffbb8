"""Values that are none, and flags that change nothing: refused with exit code 2 before anything is read or written."""

from __future__ import annotations

import re

import pytest

from megatron_prune.cli.main import main
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

CUT = "--ffn-hidden-size-remain 48 --metric magnitude"
TEXT = "--data {text}:1 --nsamples 2 --seq-length 16"


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Words that stand for paths."""
    home = tmp_path_factory.mktemp("made")
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(home / "m")), World())
    (home / "text.txt").write_text("A small text for a small tokenizer. " * 60)
    (home / "held.txt").write_text("A small text.\n")
    names = {
        "m": home / "m",
        "hf": tiny("qwen2"),
        "text": home / "text.txt",
        "held": home / "held.txt",
        "plan": home / "plan.json",
        "loop": home / "loop",
    }
    (home / "loop").symlink_to("loop")
    words = {name: str(path) for name, path in names.items()}
    main(f"prune --load {words['m']} --save {home / 'cut'} {CUT} --save-plan {words['plan']}".split())
    return words


@pytest.fixture
def refused(made, tmp_path, capsys):
    def check(command: str, said: str) -> None:
        with pytest.raises(SystemExit) as left:
            main([word.format(**made, out=tmp_path / "out") for word in command.split()])
        message = capsys.readouterr().err
        assert left.value.code == 2 and re.search(said, message, re.DOTALL), message
        assert not list(tmp_path.iterdir())

    return check


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (f"{CUT} --nsamples 4", "--nsamples where no text is read"),
        (f"{CUT} --dtype bf16", "--dtype where no text is read"),
        (f"{CUT} --tokenizer {{hf}}", "--tokenizer where no text is read"),
        (f"{CUT} {TEXT} --no-refit", "--data, --nsamples where no text is read"),
        (f"--plan {{plan}} {TEXT} --no-refit", "--data, --nsamples where no text is read"),
        ("--plan {plan} --dtype bf16", "--dtype where no text is read"),
        (f"{CUT} {TEXT} --no-refit --reconstruct 2", "--reconstruct where nothing is re-fitted"),
        (f"{CUT} --sequential", "--sequential where nothing is re-fitted"),
        (f"{CUT} --memory-batch 4", "--memory-batch without --memory"),
        (f"{CUT} --depth-metric magnitude", "--depth-metric where scores choose no layer"),
        ("--drop-layers 1 --metric magnitude --depth-metric magnitude", "--depth-metric where scores choose no layer"),
        (f"{CUT} --hidden-method select", "--hidden-method where no hidden unit is cut"),
        (f"{CUT} --search 3", "--search compares re-fitted models"),
    ],
)
def test_flags_of_a_pruning_that_change_nothing(refused, flags, said):
    refused(f"prune --load {{m}} --save {{out}} {flags}", said)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("vocab select --load-dir {hf} --remain-vocab-size 300 --prior 0.5", "--prior without --counts"),
        (
            "vocab trim --load-dir {hf} --save-dir {out} --remain-vocab-size 300 --ckpt-format torch",
            "--ckpt-format has no effect",
        ),
        (
            "vocab trim --load-dir {m} --save-dir {out} --remain-vocab-size 300 --max-shard-size 1MB",
            "--max-shard-size has no effect",
        ),
        ("export --load-dir {m} --save-dir {out} --base {m}", "--base .* has no effect.*not an adapter"),
        ("transfer --load-dir {m} --save-dir {out} --base {m}", "--base .* has no effect.*not an adapter"),
    ],
)
def test_flags_of_other_verbs_that_change_nothing(refused, command, said):
    refused(command, said)


NUMBERS = [
    ("prune --load {m} --save {out} --ratio nan", "--ratio: 'nan' is not a finite number"),
    ("prune --load {m} --save {out} --ratio 1.5", "--ratio: 1.5 is not above 0 and below 1"),
    ("prune --load {m} --save {out} --ratio 0", "--ratio: 0.0 is not above 0 and below 1"),
    ("prune --load {m} --save {out} --ratio=-1", "--ratio: -1.0 is not above 0 and below 1"),
    ("prune --load {m} --save {out} --params=-5", "--params\n  got: '-5'"),
    (f"prune --load {{m}} --save {{out}} --params {'9' * 5000}", "--params\n  got: '9999"),
    (f"prune --load {{m}} --save {{out}} --memory {'9' * 5000}GB", "--memory\n  got: '9999"),
    (f"prune --load {{m}} --save {{out}} --ffn-hidden-size-remain {10**20}", "is larger than 9223372036854775807"),
    (f"prune --load {{m}} --save {{out}} --ffn-hidden-size-remain {'1' * 9999}", "is not a whole number"),
    ("prune --load {m} --save {out} --ffn-hidden-size-remain ٣", "is not a whole number"),
    ("prune --load {m} --save {out} --drop-layers 1,1", "layer 1 twice"),
    ("prune --load {m} --save {out} --drop-layers=-1", "layer -1"),
    (f"prune --load {{m}} --save {{out}} --drop-layers {10**30}", "is not a list of whole numbers"),
    (f"prune --load {{m}} --save {{out}} {CUT} --seed=-1", "--seed: -1 is not at least 0"),
    (f"prune --load {{m}} --save {{out}} {CUT} --seed {2**64}", "--seed: 18446744073709551616 is larger"),
    (f"prune --load {{m}} --save {{out}} {CUT} {TEXT} --ridge nan", "--ridge: 'nan' is not a finite number"),
    (f"prune --load {{m}} --save {{out}} {CUT} --multiple-of ffn={'9' * 99}", "--multiple-of"),
    ("score --load {m} --save {out} --nsamples 0", "--nsamples: 0 is not a positive number"),
    ("score --load {m} --save {out} --seq-length 1", "--seq-length.*: 1 is not at least 2"),
    ("verify --load-dir {m} --hf-dir {hf} --tolerance nan", "--tolerance: 'nan' is not"),
    ("verify --load-dir {m} --hf-dir {hf} --tolerance=-1", "--tolerance: -1.0 is not at least 0"),
    ("estimate {hf} --mfu 0", "--mfu: 0.0 is not above 0 and at most 1"),
    ("estimate {hf} --device-tflops inf", "is not a finite number"),
    (f"estimate {{hf}} --target-tensor-parallel-size {2**62}", "at most 1048576"),
    (
        "convert --load-dir {hf} --save-dir {out} --target-pipeline-parallel-size 0",
        "--target-pipeline-parallel-size: 0 is not a positive",
    ),
    (f"export --load-dir {{m}} --save-dir {{out}} --max-shard-size {'9' * 5000}GB", "--max-shard-size"),
    ("recover --load {m} --save {out} --train-iters 1 --lr nan", "--lr: 'nan' is not a finite number"),
    ("vocab remap --input {text} --map {hf} --output-prefix .", "--save\n  got: .\n  needed: what the names"),
    ("preprocess --input {text} --tokenizer {hf} --output-prefix / --workers 1", "--save\n  got: /\n  needed"),
    ("vocab count --tokenizer {hf} --input {text} --output {out} --text {loop}", "loop"),
    ("prune --load {m} --save {out} --ffn-hidden-size-remain 32 --data {loop}", "loop"),
    ("convert --load-dir ~nobody_of_this_name/hf --save-dir {out}", "no such model directory: ~nobody_of_this_name/hf"),
    ("preprocess --input {text} --tokenizer ~nobody_of_this_name --output-prefix {out} --workers 1", "~nobody_of_this_name"),
    ("vocab select --load-dir ~nobody_of_this_name --remain-vocab-size 300", "~nobody_of_this_name"),
    ("vocab select --load-dir {hf} --min-count inf", "--min-count.*not a finite number"),
]


@pytest.mark.parametrize(("command", "said"), NUMBERS, ids=[command[:60] for command, _ in NUMBERS])
def test_numbers_that_are_none(refused, command, said):
    refused(command, said)
