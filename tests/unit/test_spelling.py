"""What verbs say, in the words of a caller of Python."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest

from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.files import staging
from megatron_prune.importance.statistics import read_all
from megatron_prune.in_memory import placed, standing_for
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.runtime.reporting import log
from megatron_prune.spelling import KEYS, Arguments, check_beside, nearest_keys, options_of_target, reworded
from megatron_prune.verbs.prune_hf import PruneHfOptions
from megatron_prune.verbs.table import VERBS, options_of
from megatron_prune.verbs.vocab_trim import VocabTrimOptions

GIVEN = {"load": "my model", "plan": "a plan.json", "data": ("one.txt:0.5", "two.txt:0.5"), "ratio": 2.0}


@pytest.mark.parametrize(
    "said, in_python",
    [
        ("output X exists\n  what to do: name another directory, or pass --overwrite to replace it", "pass overwrite=True to"),
        ("--plan a plan.json: no such file or directory", 'target="a plan.json": no such file'),
        ("--load my model: no such file", 'model="my model": no such file'),
        ("--load_dir_ unknown, --loads too", "--load_dir_ unknown, --loads too"),
        ("--ratio\n  got: 2.0", '"ratio"\n  got: 2.0'),
        ("leave it out, or ask for --num_layers_remain", 'ask for "num_layers"'),
        ("  - ffn_hidden_size_remain 100 is larger than the model's 96", "  - ffn_hidden_size 100 is larger"),
        ("--drop_layers 7,13 and --ratio 0.5", '"drop_layers": [7, 13] and "ratio": 0.5'),
        ("--data lists two.txt:0.5 twice", "data= lists two.txt:0.5 twice"),
        ("--data two.txt:0.5 is empty", 'data="two.txt:0.5" is empty'),
        ("name some with --data (--data=self will do)", 'name some with data= (data="self" will do)'),
        ("text with --data, without --no-refit", "text with data=, without refit=False"),
        ("or pass --refit for its own", "or pass refit=True for its own"),
        ("give --untie too", "give untie=True too"),
        ("to start from a checkpoint of it --load it", "of it model= it"),
        ("leave --metric out", "leave metric= out"),
        ("damp it more, as in --metric obs:damping=0.1", 'as in metric="obs:damping=0.1"'),
        ("--allocate free measures on text", 'allocate="free" measures on text'),
        ("compute with --dtype bf16 or fp32", 'compute with dtype="bf16" or fp32'),
        ("what can say it: --target-family mistral, --target-family qwen2", 'target_family="mistral", target_family="qwen2"'),
        ("lower --nsamples or --seq-length", "lower nsamples= or seq_length="),
        ("--nsamples 3 and --seq_length 8.", "nsamples=3 and seq_length=8."),
        ("--ridge: nothing is fitted", "ridge: nothing is fitted"),
        ("load\n  got: 3", "model\n  got: 3"),
        ("with --model-name-or-path, as it once was", "with model=, as it once was"),
        # what is typed into a shell stays as it is
        (
            "run megatron-prune prune-hf --plan PLAN --uniform, or leave --plan out",
            "run megatron-prune prune-hf --plan PLAN --uniform, or leave target= out",
        ),
        (
            "look with megatron-prune inspect --weights, or compute with --dtype fp32",
            'megatron-prune inspect --weights, or compute with dtype="fp32"',
        ),
        ("start with torchrun --nproc-per-node 2 or set --seed 3", "torchrun --nproc-per-node 2 or set seed=3"),
        ("the column with --data-field (preprocess: --json-keys)", "the column with data_field= (preprocess: --json-keys)"),
    ],
)
def test_a_flag_becomes_the_argument_that_it_is(said, in_python):
    found = Arguments(PruneHfOptions, GIVEN, {"load": "model", "plan": "target"})(said)
    assert in_python in found


def test_an_option_of_another_verb_is_its_own_argument():
    say = Arguments(VocabTrimOptions, {}, {"remain_vocab_size": "size"})
    assert say("one of --remain-vocab-size, --min-count, --coverage") == "one of size=, min_count=, coverage="


@pytest.mark.parametrize("verb", VERBS)
def test_no_flag_of_a_verb_is_left(verb):
    """Of every option of every verb, in both spellings, beside a value and alone."""
    kind = options_of(verb)
    for name, item in kind.__dataclass_fields__.items():
        if "group" not in item.metadata:
            continue
        for flag in (f"--{name}", f"--{name.replace('_', '-')}", f"--no-{name}" if item.type == "bool | None" else f"--{name}"):
            for text in (f"{flag} 3 is wrong", f"no {flag}\n  got: 3", f"({flag})", f"{flag}: not"):
                found = Arguments(kind, {}, {})(text)
                assert "--" not in found and (name in found or KEYS.get(name.removesuffix("_remain")) == name)


def test_errors_and_the_log_are_said_in_other_words():
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    log.addHandler(handler)
    try:
        with (
            pytest.raises(CheckpointError, match="^there it is\n  got: there$"),
            reworded(lambda text: text.replace("here", "there")),
        ):
            log.warning("it is %s", "here")
            raise CheckpointError("here it is", got="here")
        log.warning("here again")
    finally:
        log.removeHandler(handler)
    assert heard == ["it is there", "here again"]
    with pytest.raises(KeyError), reworded(str.upper):
        raise KeyError("of others")


def test_no_temporary_place_is_named_nor_its_removal_advised(tmp_path, monkeypatch):
    """Neither what stands for something in memory nor what is made beside it, also where the way there is a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))

    with pytest.raises(CheckpointError) as found, placed(None, "pruned", "memory") as place:
        with staging.work(Path(place), "any", main=True, agree=lambda error: None) as folder:
            (folder / "gradients.safetensors").write_bytes(b"no tensors")
            read_all(folder / "gradients.safetensors")
    broken = str(found.value)
    assert broken.startswith("work on memory: gradients.safetensors ") and "remove" not in broken and "tmp" not in broken
    assert str(tmp_path) not in broken and "content" not in broken
    with pytest.raises(InputError) as found, standing_for("/tmp/tmp_12345", "M in memory"):
        raise InputError("/tmp/.tmp_12345.partial-2/old and tmp_12345", do="remove /tmp/tmp_12345/x, and more")
    assert str(found.value) == "work on M in memory and M in memory"
    with pytest.raises(InputError, match="/tmp/.tmp_123456.work is"), standing_for("/tmp/tmp_12345", "it"):
        raise InputError("/tmp/.tmp_123456.work is another's")


# ------------------------------------------------------------------------------------------------------------- target


@pytest.mark.parametrize(
    "key, meant",
    [
        ("ffn", "ffn_hidden_size"),
        ("intermediate_size", "ffn_hidden_size"),
        ("fnn_hidden_size", "ffn_hidden_size"),
        ("num_hidden_layers", "num_layers"),
        ("layers", "num_layers"),
        ("num_layers_remain", "num_layers"),
        ("hidden", "hidden_size"),
        ("hidden_dim", "hidden_size"),
        ("d_model", "hidden_size"),
        ("num_heads", "num_attention_heads"),
        ("heads", "num_attention_heads"),
        ("num_key_value_heads", "num_query_groups"),
        ("query_groups", "num_query_groups"),
        ("sparsity", "ratio"),
        ("ratios", "ratio"),
        ("param", "params"),
        ("drop_layer", "drop_layers"),
    ],
)
def test_a_key_that_there_is_not_names_the_nearest(key, meant):
    assert meant in nearest_keys(key) and set(nearest_keys(key)) <= set(KEYS)
    with pytest.raises(InputError, match=f"{key!r} is no key of target=; did you mean .*{meant!r}"):
        options_of_target({key: 3}, PruneHfOptions, {})


def test_what_target_says():
    assert options_of_target({"ffn_hidden_size": 48, "ratio": None, "drop_layers": [1]}, PruneHfOptions, {}) == {
        "ffn_hidden_size_remain": 48,
        "drop_layers": [1],
    }
    assert options_of_target("plan.json", PruneHfOptions, {}) == {"plan": "plan.json"}
    for beside in ({"untie": True}, {"vocab_plan": "tokens.json"}):  # something to do by themselves
        assert options_of_target({}, PruneHfOptions, beside) == {}
    assert set(KEYS.values()) == {*TargetOptions.SIZES, *TargetOptions.BY_LAYER, *TargetOptions.BUDGETS}


@pytest.mark.parametrize(
    "target, said",
    [
        ({}, r"target= says nothing\n  got: {}"),
        ({"ratio": None}, "target= says nothing"),
        (None, "target=\n  got: None"),
        (64, "target=\n  got: 64"),
        (["ratio", 0.2], "target=\n  got: .'ratio', 0.2"),
        ({"xyzzy": 1}, "'xyzzy' is no key of target=\n  needed: some of hidden_size, ffn_hidden_size"),
        ({3: 1}, "3 is no key of target=\n"),
        ({"plan": "p.json"}, "(?s)'plan' is no key.*as target= itself"),
        ({"ratio": 0.2, "metric": "obs"}, "(?s)'metric' is no key.*say it beside: metric='obs'"),
        ({"vocab_size": 100}, "(?s)'vocab_size' is no key.*mp.trim_vocabulary\\(…, size=100\\), or say vocab_plan= beside$"),
        *(({name: 3}, f"(?s)^{name!r} is no key(?!.*beside).*needed") for name in ("hf_dir", "believe", "rotary_base", "load")),
    ],
)
def test_a_target_that_says_nothing_is_refused(target, said):
    with pytest.raises(InputError, match=said):
        options_of_target(target, PruneHfOptions, {})


def test_what_belongs_into_target_is_not_said_beside_it():
    check_beside({"metric": "obs", "multiple_of": "ffn=8"})
    for name in ("ratio", "num_layers", "num_layers_remain"):
        with pytest.raises(InputError, match=f'(?s){name}= is no argument.*target=: {{"{name.removesuffix("_remain")}": 3}}'):
            check_beside({name: 3})
    with pytest.raises(InputError, match="(?s)metric=.*needed: a name.*@mp.metric"):
        check_beside({"metric": lambda weight: weight})
