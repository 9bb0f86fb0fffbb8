"""A command line: flags made from dataclasses, files of options, help, completion, and what is said of a bad one."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.cli.completion import SHELLS, script
from megatron_prune.cli.config_file import set_defaults, text_of
from megatron_prune.cli.ending import NEXT, Ending
from megatron_prune.cli.main import main
from megatron_prune.cli.parser import made, parse, parser_of
from megatron_prune.config import GROUPS, MEANT, made_of, option
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.verbs.table import VERBS, options_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """what it does"""

    EXAMPLES: ClassVar = {"all": "prog --load x", "shape": "--size 7"}

    load: str = option("where from", group="model", former=("load_dir",), positional=True)
    kind: str = option("which", "b", choices=["alpha", "b"])
    size: int | None = option("how large", None, group="shape")
    seed: int = option("which draw", 1234)
    rate: float = option("how fast, in %", 0.5)
    layers: tuple[int, ...] | None = option("which go", None)
    words: tuple[str, ...] = option("what is said", ())
    refit: bool | None = option("again", None)
    strict: bool = option("refuse", False)
    plan: str | None = option("a file", None, exists=True)


def read(*argv: str) -> Options:
    return parse(Options, list(argv), prog="prog")


def test_a_flag_that_is_not_given_has_the_dataclass_default():
    assert read("--load", "x") == Options(load="x")


@pytest.mark.parametrize("words", [["--load", "x"], ["--load-dir", "x"], ["--load_dir", "x"], ["--load_dir=x"], ["x"]])
def test_dashes_underscores_other_names_and_a_word_alone_mean_the_same(words):
    assert read(*words) == Options(load="x")


def test_every_type_is_read():
    words = "--load x --kind alpha --size 7 --seed -1 --rate 1e-3 --layers 7,13 --words a b --no-refit --strict"
    expected = {"size": 7, "seed": -1, "rate": 1e-3, "layers": (7, 13), "words": ("a", "b"), "refit": False, "strict": True}
    assert read(*words.split()) == Options(load="x", kind="alpha", **expected)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--load", "x", "--unknown", "1"], "--unknown is no flag of prog"),
        (["--load", "x", "--siz", "1"], "--siz is no flag of prog; did you mean --size?\n  what to do: see prog --help"),
        (["--laod", "x"], "--laod is no flag of prog; did you mean --load?"),
        (["--load", "x", "--Strict"], "--Strict is no flag of prog; did you mean --strict?"),
        (
            ["--load", "x", "--rat=2", "--sied", "2"],
            "--rat is no flag of prog; did you mean --rate?\n  and: --sied is no flag of prog",
        ),
        (["--load", "x", "stray"], "--load x and stray"),
        (["x", "stray"], "'stray' stands without a flag\n  what to do: see prog --help"),
        (["x", "stray", "other"], "'stray' and 'other' stand without a flag\n  what"),
        (
            ["--size", "1", "--rat", "2", "x", "stray"],
            "--rat is no flag of prog; did you mean --rate?\n  what",
        ),
        (["--size", "1"], "--load is needed"),
        (["--load", "x", "--size", "1.5"], "--size: '1.5' is not a whole number"),
        (["--load", "x", "--size"], "--size: expected one argument"),
        (["--load", "x", "--kind", "alpa"], "--kind: 'alpa' is none of alpha, b; did you mean alpha?"),
        (["--load", "x", "--layers", "1,two"], "--layers: '1,two' is not a list of whole numbers"),
        (["--load", "x\udcff"], "is not UTF-8"),
        (["--load", "x\0"], "holds a NUL"),
        (["--load=--"], "--load: '--' is no value"),
        (["--load", "x", "--size=--"], "--size: '--' is no value"),
        (
            ["--load", "x", "--plan", "/nowhere/p.json"],
            "--plan /nowhere/p.json: no such file or directory",
        ),
    ],
)
def test_a_bad_command_line_is_refused_naming_what_was_mistyped(argv, said):
    with pytest.raises(InputError) as refused:
        read(*argv)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "verb, given, meant",
    [
        *(("prune-hf", word, "--load") for word in ("--model", "--model-path", "--input-model", "--laod")),
        *(("prune-hf", word, "--save") for word in ("--output", "--out", "--output-dir", "-o", "--output_pat")),
        *(("prune", word, "--tensor-model-parallel-size") for word in ("--tp", "--tensor-parallel", "--tensor-parallel-size")),
        *(("convert", word, "--target-tensor-parallel-size") for word in ("--tp", "--tensor_model_parallel_size")),
        ("convert", "--hlep", "--help"),
        ("prune", "--pp", "--pipeline-model-parallel-size"),
        ("convert", "--pp", "--target-pipeline-parallel-size"),
        *(("prune", word, "--ratio") for word in ("--pruning-ratio", "--sparsity", "--Ratio")),
        ("prune", "--budget", "--ratio or --params"),
        ("plan", "--layers", "--num-layers-remain"),
        ("plan", "--num-hidden-layers", "--num-layers-remain"),
        ("plan", "--intermediate-size", "--ffn-hidden-size-remain"),
        *(("score", word, "--data") for word in ("--dataset", "--calibration-data")),
        ("recover", "--dataset", "--data-path"),
        ("prune", "--no-refti", "--no-refit"),
        ("export", "--sparsity", None),
        ("prune", "--xyzzy", None),
    ],
)
def test_words_of_other_tools_are_answered_with_ours(verb, given, meant):
    said = parser_of(options_of(verb), verb).unknown(given)
    assert said == f"{given} is no flag of {verb}" + (f"; did you mean {meant}?" if meant else "")


def test_every_word_of_other_tools_means_an_option_of_some_verb():
    options = {verb: {item.name for item in dataclasses.fields(options_of(verb))} for verb in VERBS}
    assert {name for names in MEANT.values() for name in names} <= set().union(*options.values())


def test_from_python_the_same_words_are_known():
    for word, meant in (("model", "load"), ("tp", "tensor_model_parallel_size"), ("budget", "ratio or params")):
        with pytest.raises(InputError, match=f"^{word} is no argument of f; did you mean {re.escape(meant)}\\?$"):
            made_of(options_of("prune"), {word: 1}, of="f")


@pytest.mark.parametrize(
    "verb, words, said",
    [
        ("compare", ["a", "b", "c"], "'c' stands without a flag\n  what to do: see compare --help"),
        ("preprocess", ["t.txt"], "'t.txt' stands without a flag\n  needed: --save and --tokenizer and --input\n"),
        ("vocab count", ["m/llama"], "'m/llama' stands without a flag\n  needed: --tokenizer and --save and --input\n"),
        ("export", ["A", "B"], "'B' stands without a flag\n  needed: --save\n"),
        ("compare", ["a"], "--after is needed"),
    ],
)
def test_a_word_without_a_flag_is_answered_with_the_flags_that_are_missing(verb, words, said):
    with pytest.raises(InputError) as refused:
        parse(options_of(verb), words, prog=verb)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("words", ["a b", "--before a --after b", "a --after b", "--after b a", "--prompt hm a b"])
def test_two_models_are_compared_in_the_order_in_which_they_are_named(words):
    options = parse(options_of("compare"), words.split(), prog="compare")
    assert (options.before, options.after) == ("a", "b")


def test_the_help_has_groups_with_an_example_and_every_flag_with_its_text_choices_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in (
        "--load LOAD ",
        "(also --load-dir)",
        "where from",
        "{alpha,b}",
        "(default: 1234)",
        "(default: 0.5)",
        "what it does",
    ):
        assert part in text
    for part in ("--refit, --no-refit", "in %", f"{GROUPS['shape']}:\n  for example: --size 7", "example:\n  prog --load x"):
        assert part in text
    assert "None" not in text and "False" not in text and "__" not in text


# --------------------------------------------------------------------------------------------------------- files of options


def from_file(text: str, folder, *argv: str) -> Options:
    parser = parser_of(Options, "prog")
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    set_defaults(parser, folder / "c.yaml")
    return made(Options, parser.parse_args(list(argv)))


def test_a_file_says_what_flags_say_and_the_command_line_goes_before_it(tmp_path):
    text = "load_dir: x\nrate: 1e-3\nlayers: [7, 13]\nwords: [a, b c]\nstrict: true\nrefit: false\nsize: null\nplan:\nseed: 5\n"
    expected = {"rate": 1e-3, "layers": (7, 13), "words": ("a", "b c"), "strict": True, "refit": False}
    assert from_file(text, tmp_path) == Options(load="x", seed=5, **expected)
    assert from_file(text, tmp_path, "y", "--seed", "6", "--refit") == Options(load="y", seed=6, **{**expected, "refit": True})
    assert from_file("load-dir: x\nlayers: 7,13", tmp_path).layers == (7, 13)
    assert from_file("load: 007", tmp_path).load == "007", "what is written is what counts, not what YAML makes of it"


@pytest.mark.parametrize(
    "text, said",
    [
        ("laod: x", "c.yaml: --laod is no flag of prog; did you mean --load?"),
        ("load: x\nload_dir: y", "says load and load_dir, which are the same"),
        ("load: x\nload: y", "c.yaml says load twice"),
        ("load: [a, b]", "c.yaml: --load takes one value, not 2"),
        ("kind: [alpha, b]", "c.yaml: --kind takes one value, not 2"),
        ("load: {a: b}", "values within values"),
        ("load: [[a]]", "values within values"),
        ("size: 1.5", "c.yaml: --size: '1.5' is not a whole number"),
        ("strict: 1", "--strict"),
        ("kind: c", "'c' is none of alpha, b"),
        ("- a", "a YAML sequence"),
        ("a: b: c", "is not YAML, line 1"),
        ("config: other.yaml", "config is for the command line alone"),
        ("help: true", "help is for the command line alone"),
        ("a: &a [x]\nb: *c", "is not YAML"),
        ("[" * 100_000, "is not YAML"),
    ],
)
def test_a_file_that_says_something_else_is_refused(text, said, tmp_path):
    with pytest.raises(InputError) as refused:
        from_file(text, tmp_path)
    assert said in str(refused.value) and "c.yaml" in str(refused.value)


def test_a_file_of_another_verb_is_read_but_for_what_it_says_of_that_verb_alone(tmp_path, capsys):
    def printed(*words: str) -> dict:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print-config"])
        said = capsys.readouterr()
        assert stop.value.code == 0, said.err
        return yaml.safe_load(said.out)

    file = tmp_path / "q.yaml"
    for more in ([], ["--max-shard-size", "1GB"]):
        with pytest.raises(SystemExit):
            main(["prune-hf", "--load", "m", "--ratio", "0.25", *more, "--print-config"])
        file.write_text(capsys.readouterr().out, encoding="utf-8")
        if not more:
            assert (found := printed("estimate", "--config", str(file)))["ratio"] == 0.25
            assert found["load"] == "m" and "push_public" not in found
    for text in (file.read_text(), "max_shard_size: 1GB"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            main(["estimate", "--config", str(file)])
        verb = "prune-hf" if text.startswith("#") else "export"
        said = f"{file}: max_shard_size is an option of megatron-prune {verb}, not of megatron-prune estimate"
        assert stop.value.code == 2 and said in capsys.readouterr().err
    file.write_text("# options of megatron-prune prune-hf\npush_publik: false", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["estimate", "--config", str(file)])
    assert "--push_publik is no flag of megatron-prune estimate" in capsys.readouterr().err


def test_words_with_commas_may_stand_as_a_list_in_a_file(tmp_path):
    parser = parser_of(options_of("plan"), "plan")
    (tmp_path / "c.yaml").write_text("load: [m]\nsave: p\nserve: [vllm, tp=4]\nmultiple_of: [hidden=64, ffn=128]\n")
    set_defaults(parser, tmp_path / "c.yaml")
    options = made(options_of("plan"), parser.parse_args([]))
    assert (options.load, options.serve, options.multiple_of) == ("m", "vllm,tp=4", "hidden=64,ffn=128")


TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(
    lambda t: t.strip() and not t.startswith("-")
)


@given(load=TEXTS, words=st.lists(TEXTS, max_size=3), rate=st.floats(-1e9, 1e9), layers=st.lists(st.integers(0, 99), min_size=1))
def test_what_print_config_prints_says_the_same_again(load, words, rate, layers, tmp_path_factory):
    argv = [f"--load={load}", f"--rate={rate!r}", "--layers", ",".join(map(str, layers)), *(["--words", *words] if words else [])]
    printed = text_of(Options, parser_of(Options, "prog").parse_args(argv), "prog")
    assert from_file(printed, tmp_path_factory.mktemp("c")) == read(*argv)
    assert yaml.safe_load(printed)["seed"] == 1234


# ---------------------------------------------------------------------------------------------------------------- verbs


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_that_is_read_and_options_in_groups(verb, monkeypatch):
    kind = options_of(verb)
    monkeypatch.setattr("megatron_prune.cli.parser.check_there", lambda options: None)
    words = shlex.split(kind.EXAMPLES["all"])
    words = words[words.index("megatron_prune" if "-m" in words else "megatron-prune") + 1 :]
    assert " ".join(words).startswith(verb + " ")
    parse(kind, words[len(verb.split()) :], prog="x")
    needed = [word for item in dataclasses.fields(kind) if item.default is dataclasses.MISSING for word in needed_words(item)]
    for group in set(kind.EXAMPLES) - {"all"}:
        flags = kind.EXAMPLES[group].replace(", or a budget:", "").split()
        parse(kind, [*needed, *flags], prog="x")


def needed_words(item: dataclasses.Field) -> list[str]:
    return [f"--{item.name}", "1"] if "group" in item.metadata else []


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_of_every_verb_can_be_printed_and_read_again(verb, capsys, tmp_path):
    def printed(*words: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*verb.split(), *map(str, words), "--print-config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    first = printed()
    (tmp_path / "c.yaml").write_text(first, encoding="utf-8")
    assert printed("--config", tmp_path / "c.yaml") == first


@pytest.mark.parametrize(
    "words, said",
    [
        (["purne"], "'purne' is no verb; did you mean prune?"),
        (["vocab", "trm"], "'vocab trm' is no verb; did you mean vocab trim?"),
        (["voacb"], "'voacb' is no verb; did you mean vocab?"),
        (["vocab"], "'vocab' is no verb"),
    ],
)
def test_a_verb_that_there_is_not_is_answered_with_the_nearest(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["vocab", "--help"], ["help", "vocab"], ["vocab", "-h"]])
def test_the_help_of_a_family_of_verbs_lists_them(words, capsys):
    main(words)
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS if verb.startswith("vocab ")) and "convert" not in text


@pytest.mark.parametrize("words", [["help", "vocab", "trim"], ["vocab", "trim", "--help"]])
def test_help_before_a_verb_is_help_behind_it(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "usage: megatron-prune vocab trim --load LOAD --save SAVE [options]" in capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_verb_and_flag(shell):
    text = script(shell)
    assert all(word in text for verb in VERBS for word in verb.split())
    assert "--ffn-hidden-size-remain" in text or "ffn-hidden-size-remain" in text


def test_bash_takes_the_completion():
    asked = f"{script('bash')}\nCOMP_WORDS=(megatron-prune vocab tr); COMP_CWORD=2; _shtab_megatron_prune; echo ${{COMPREPLY[@]}}"
    found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert found.stdout.split() == ["trim"], found.stderr


def test_a_message_about_a_command_line_comes_before_torch(tmp_path):
    code = "import sys\nfrom megatron_prune.cli.main import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules)"
    words = ["prune", "--load", str(tmp_path / "none"), "--save", "x", "--ratio", "0.25"]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert found.returncode == 2 and "no such file or directory" in found.stderr and found.stdout == "False\n"


def test_every_verb_that_writes_says_what_comes_next():
    writing = {verb for verb in VERBS if {"save", "save_plan"} & {item.name for item in dataclasses.fields(options_of(verb))}}
    assert set(NEXT) == writing


def following(verb: str, given: list[str], ranks: int = 1) -> tuple[str, object]:
    """The verb that is proposed after ``verb``, and its options as they are read."""
    said = NEXT[verb](parse(options_of(verb), given, prog="x"), ranks)
    words = shlex.split(said.replace("…", "there"))
    words = words[words.index("megatron_prune" if "-m" in words else "megatron-prune") + 1 :]
    found = max((other for other in VERBS if " ".join(words).startswith(f"{other} ")), key=len)
    argv = words[len(found.split()) :] + (["--global-batch-size", "8"] if found == "recover" else [])
    assert ("torchrun --nproc-per-node 3" in said) == (
        ranks == 3 and found in ("prune", "recover") and verb not in ("preprocess", "vocab remap")
    )
    return found, parse(options_of(found), argv, prog="x")


@pytest.fixture
def a_model_of_each_kind(tmp_path, monkeypatch):
    """Names of a Hugging Face directory and of a checkpoint; other files need not be there."""
    monkeypatch.setattr("megatron_prune.cli.parser.check_there", lambda options: None)
    for name, file in (("hf", "config.json"), ("megatron", "latest_checkpointed_iteration.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    return {name: str(tmp_path / name) for name in ("hf", "megatron")}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize("verb", NEXT)
def test_what_comes_next_is_a_command_of_ours_for_a_model_of_this_kind(verb, kind, ranks, a_model_of_each_kind):
    needed = [
        word
        for item in dataclasses.fields(options_of(verb))
        if item.default is dataclasses.MISSING
        for word in ([f"--{item.name}", a_model_of_each_kind[kind]] if item.name == "load" else needed_words(item))
    ]
    found, _ = following(verb, needed, ranks)
    if verb in ("score", "plan"):
        assert found == {"hf": "prune-hf", "megatron": "prune"}[kind]


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_the_pruning_of_a_plan_is_told_what_the_plan_was(kind, a_model_of_each_kind):
    said = ["--target-family", "mistral", "--serve", "vllm,tp=4", "--prune-type", "unbalance", "--tokenizer", "a tokenizer"]
    found, options = following("plan", ["--load", a_model_of_each_kind[kind], "--save", "p.json", *said, "--hf-dir", "h"])
    assert (options.target_family, options.serve, options.tokenizer) == ("mistral", "vllm,tp=4", "a tokenizer")
    if kind == "megatron":
        assert (found, options.prune_type, options.hf_dir) == ("prune", "unbalance", "h")


def test_after_an_adapter_no_command_is_proposed_that_refuses_it(a_model_of_each_kind):
    given = ["--load", a_model_of_each_kind["megatron"], "--save", "adapter"]
    assert NEXT["export"](parse(options_of("export"), [*given, "--adapter-only"], prog="x"), 1) is None
    assert following("export", given)[0] == "inspect"


def test_the_ending_says_where_how_large_and_how_long(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", log.name)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(bytes(1500))
    (tmp_path / "p_text_document.bin").write_bytes(bytes(2_000_000))
    (tmp_path / "p_text_document.idx").write_bytes(bytes(500_000))
    for verb, save, size in (("export", tmp_path / "d", "1.5 KB"), ("preprocess", tmp_path / "p", "2.5 MB")):
        words = [
            word
            for item in dataclasses.fields(options_of(verb))
            if item.default is dataclasses.MISSING
            for word in needed_words(item)
        ]
        monkeypatch.setattr("megatron_prune.cli.parser.check_there", lambda options: None)
        options = dataclasses.replace(parse(options_of(verb), words, prog="x"), save=str(save))
        Ending(verb, options, World()).say()
        assert re.search(rf"{save}: {size} in 0\.\d s", caplog.text)
    before = caplog.text
    Ending("export", options, World(rank=1, size=2)).say()
    Ending("inspect", options, World()).say()
    assert caplog.text == before


def test_finished_parts_that_another_request_left_are_named(tmp_path, caplog, monkeypatch):
    save = tmp_path / "out"
    save.write_text("x" * 10)
    with pytest.raises(KeyboardInterrupt), staging.work(save, "one", main=True, agree=lambda error: None) as folder:
        (folder / "part").write_text("half")
        raise KeyboardInterrupt
    ending = Ending("export", made_of(options_of("export"), {"load": tmp_path, "save": save}, of="export"), World())
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", log.name)
    ending.say()
    assert f"{tmp_path / '.out.work'} holds what a stopped run of another request had finished" in caplog.text
    with staging.work(save, "two", main=True, agree=lambda error: None) as folder:
        assert not list(folder.iterdir())
    caplog.clear()
    ending.say()
    assert "stopped run" not in caplog.text and not (tmp_path / ".out.work").exists()
