"""Checkpoints of Megatron-LM and Megatron-Bridge: read as the model they are, or refused by name; nothing is taken in silence."""

from __future__ import annotations

import dataclasses
import enum
import filecmp
import json
import random
import shutil
import sys
import types
from types import SimpleNamespace

import numpy
import pytest
from foreign import run
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_lm import arguments, bridge, converted, edit_metadata, foreign, restaged, without_common

from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.description import Told

FORMATS = ("torch", "torch_dist")


@pytest.fixture(scope="module")
def ours(tiny, tmp_path_factory):
    """``ours("torch", "qwen2", tp=2)`` → (checkpoint of ours, its Hugging Face model); built once."""
    built: dict[tuple, object] = {}

    def get(fmt: str = "torch", family: str = "qwen2", tp: int = 1, pp: int = 1, **changes):
        source = tiny(family, **changes)
        key = (fmt, family, tp, pp, repr(changes))
        if key not in built:
            built[key] = converted(source, tmp_path_factory.mktemp("ours") / "m", fmt=fmt, tp=tp, pp=pp)
        return built[key], source

    return get


def exports_exactly(root, source, *more) -> None:
    """``export --hf-dir`` gives every file of the model, byte for byte."""
    back = root.parent / "back"
    assert run("export", "--load-dir", root, "--save-dir", back, "--hf-dir", source, *more) == 0
    names = sorted(file.name for file in source.iterdir())
    assert filecmp.cmpfiles(source, back, names, shallow=False) == (names, [], [])
    shutil.rmtree(back)


def refused(capsys, *argv) -> str:
    """Exit code 2 without a traceback; the message."""
    capsys.readouterr()
    assert run(*argv) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# -------------------------------------------------------------------------------------------- what else is in the files


def known_only_there(module: str, name: str, **members) -> type:
    """An enumeration of a module that this process has not; it can be pickled."""
    for count in range(1, module.count(".") + 2):
        sys.modules.setdefault(".".join(module.split(".")[:count]), types.ModuleType(module))
    kind = enum.Enum(name, members, module=module, qualname=name)
    setattr(sys.modules[module], name, kind)
    return kind


@dataclasses.dataclass
class Settings:
    """Of no kind that is known: inert when it is read."""


@pytest.mark.parametrize("fmt", FORMATS)
def test_random_states_and_enumerations_of_any_version_are_passed_over(ours, tmp_path, fmt):
    m, source = ours(fmt)
    kind = known_only_there("megatron_of_2023.model.enums", "ModelType", decoder=1)
    scope = known_only_there("megatron_of_2027.core.transformer.enums", "InferenceCudaGraphScope", layer=2)

    def edit(content) -> None:
        content["rng_state"] = [{"np_rng_state": numpy.random.get_state(), "random_rng_state": random.getstate()}]
        content["rerun_state_machine"] = {"mode": kind.decoder, "seen": {1, 2}, "at": numpy.float64(1.5)}
        arguments(model_type=kind.decoder, inference_cuda_graph_scope=scope.layer, timers=Settings())(content)

    exports_exactly(foreign(m, tmp_path / "c", edit), source)


def test_an_argument_that_is_needed_and_of_a_type_not_known_is_refused_with_its_name_and_type(ours, tmp_path, capsys):
    m, source = ours()
    root = foreign(m, tmp_path / "c", arguments(rotary_base=numpy.float64(10000.0), position_embedding_type=Settings()))
    message = refused(capsys, "export", "--load-dir", root, "--save-dir", tmp_path / "out", "--hf-dir", source)
    assert "rotary_base = a value of type numpy" in message and "position_embedding_type = a value of type" in message


def as_data_class(args):
    kind = dataclasses.make_dataclass("Arguments", list(vars(args)))
    kind.__module__ = "test_foreign_megatron"
    setattr(sys.modules.setdefault("test_foreign_megatron", types.ModuleType("x")), "Arguments", kind)
    return kind(**vars(args))


@pytest.mark.parametrize(
    "kind", [vars, lambda args: SimpleNamespace(**vars(args)), as_data_class], ids=["dict", "simple", "class"]
)
def test_args_of_any_kind_that_has_names_are_read(ours, tmp_path, kind):
    m, source = ours()
    root = foreign(m, tmp_path / "c", lambda content: content.update(args=kind(content["args"])))
    assert megatron.open_checkpoint(root).config == megatron.open_checkpoint(m).config
    exports_exactly(root, source)


@pytest.mark.parametrize("value", [3, [1], "text"])
def test_args_of_a_kind_without_names_are_refused(ours, tmp_path, capsys, value):
    root = foreign(ours()[0], tmp_path / "c", lambda content: content.update(args=value))
    assert "args" in refused(capsys, "inspect", root)


def test_heads_in_the_order_of_before_megatron_core_are_refused(ours, tmp_path, capsys):
    root = foreign(ours()[0], tmp_path / "c", lambda content: content.update(checkpoint_version=1.0))
    assert "checkpoint_version" in refused(capsys, "inspect", root)


@pytest.mark.parametrize("fmt", FORMATS)
def test_modules_that_wrapped_the_model_leave_no_trace(ours, tmp_path, fmt):
    m, source = ours(fmt)
    wrap = lambda names: {f"module.module.{name}": value for name, value in names.items()}

    def edit(content) -> None:
        if "model" in content:
            content["model"] = wrap(content["model"])

    root = foreign(m, tmp_path / "c", edit)
    if fmt == "torch_dist":

        def rename(metadata) -> None:
            metadata.state_dict_metadata = wrap(metadata.state_dict_metadata)
            places = metadata.storage_data
            metadata.storage_data = {dataclasses.replace(i, fqn=f"module.module.{i.fqn}"): place for i, place in places.items()}

        edit_metadata(root / "release", rename)
    exports_exactly(root, source)


def test_the_common_state_of_core_0_19_is_read_from_beside_the_tensors(ours, tmp_path):
    m, source = ours("torch_dist", tp=2)
    exports_exactly(without_common(foreign(m, tmp_path / "c")), source)


# ------------------------------------------------------------------------------------------------- pipelines, no args


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_stages_and_virtual_stages_are_read_by_what_they_hold(ours, tmp_path_factory, data):
    virtual, stages = data.draw(st.sampled_from([(1, 2), (1, 3), (2, 2), (1, 4), (3, 2)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, 4), min_size=virtual * stages - 1, max_size=virtual * stages - 1)))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, 4])]
    chunks = [counts[row * stages : (row + 1) * stages] for row in range(virtual)]
    m, source = ours("torch", "llama", tie_word_embeddings=True)
    root = restaged(m, tmp_path_factory.mktemp("stages") / "c", chunks, decoder_first_pipeline_num_layers=counts[0])
    exports_exactly(root, source)


def test_stages_that_hold_another_number_of_layers_than_the_model_are_refused(ours, tmp_path, capsys):
    m, _ = ours("torch", "llama", tie_word_embeddings=True)
    assert "3 layers in its 2 model chunks, needed 4" in refused(capsys, "inspect", restaged(m, tmp_path / "c", [[1, 2]]))
    assert "layers" in refused(capsys, "inspect", restaged(m, tmp_path / "d", [[2, 2]], num_layers=3))


@pytest.mark.parametrize("fmt", FORMATS)
def test_without_args_a_checkpoint_is_the_model_of_hf_dir(ours, tmp_path, capsys, fmt):
    m, source = ours(fmt, tp=2, pp=2)
    root = foreign(m, tmp_path / "c", lambda content: content.pop("args"))
    assert "holds no args" in refused(capsys, "inspect", root)
    exports_exactly(root, source)
    opened = megatron.open_checkpoint(root, Told(hf_dir=source))
    assert (opened.layout.tensor, opened.layout.pipeline) == ((2, 2) if fmt == "torch" else (1, 1))
    assert opened.layout.padded_vocab(307) == 512


def test_no_experts_are_none(ours, tmp_path):
    m, source = ours()
    exports_exactly(foreign(m, tmp_path / "c", arguments(num_experts=0, mtp_num_layers=0, window_attn_skip_freq=2)), source)


# ------------------------------------------------------------------------------- args, --hf-dir and flags, side by side


CONTRADICTIONS = {
    "rotary_base": (dict(rotary_base=500000), "rotary_base: the stored arguments say 500000.0, config.json 10000.0"),
    "scaling": (dict(use_rope_scaling=True), "rope_scaling: the stored arguments say llama3 × 8, config.json None"),
    "linear": (dict(rotary_seq_len_interpolation_factor=2.0), "rope_scaling: the stored arguments say linear × 2"),
    "epsilon": (
        dict(norm_epsilon=1e-5, layernorm_epsilon=1e-5),
        "norm_epsilon: the stored arguments say 1e-05, config.json 1e-06",
    ),
    "window": (dict(window_size=(31, 0)), "sliding_window: the stored arguments say 32, config.json None"),
    "vocabulary": (dict(vocab_size=300), "vocab_size: the stored arguments say 300, config.json 307"),
    "ties": (dict(untie_embeddings_and_output_weights=False), "tie_embeddings: the stored arguments say True, config.json False"),
    "biases": (dict(add_qkv_bias=False), "qkv_bias: the stored arguments say False, config.json True"),
    "layers": (dict(num_layers=3), "num_layers: the stored arguments say 3, config.json 4"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_args_and_hf_dir_say_differently_is_refused_until_one_is_believed(ours, tmp_path, capsys, case):
    changes, said = CONTRADICTIONS[case]
    m, source = ours("torch", "qwen2")
    root = foreign(m, tmp_path / "c", arguments(**changes))
    argv = ["export", "--load-dir", root, "--save-dir", tmp_path / "out", "--hf-dir", source]
    message = refused(capsys, *argv)
    assert said in message and "--believe args, or --believe hf" in message
    assert not (tmp_path / "out").exists()
    exports_exactly(root, source, "--believe", "hf")


def test_believed_args_are_exported(ours, tmp_path):
    m, source = ours("torch", "qwen2")
    root = foreign(
        m, tmp_path / "c", arguments(rotary_base=500000, use_rope_scaling=True, norm_epsilon=1e-5, layernorm_epsilon=...)
    )
    argv = ["export", "--load-dir", root, "--save-dir", tmp_path / "out", "--hf-dir", source, "--believe", "args"]
    assert run(*argv) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["rope_scaling"]["factor"]) == (1e-5, 500000.0, 8.0)


@pytest.mark.parametrize(
    "other, word",
    [
        ({"vocab_size": 5000}, "vocab_size"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"hidden_size": 96}, "hidden_size"),
        ({"family": "qwen3"}, "qk_norm"),
        ({"family": "llama"}, "qkv_bias"),
    ],
)
@pytest.mark.parametrize("whose", ["foreign", "foreign without a vocabulary", "ours"])
def test_the_directory_of_another_model_is_refused(ours, tiny, tmp_path, capsys, other, word, whose):
    m, _ = ours()
    changes = arguments(vocab_size=None) if "without" in whose else lambda content: None
    root = m if whose == "ours" else foreign(m, tmp_path / "c", changes)
    source = tiny(**{"family": "qwen2", **other})
    message = refused(capsys, "export", "--load-dir", root, "--save-dir", tmp_path / "out", "--hf-dir", source)
    assert (word in message or whose == "ours" and "family" in message or "vocabulary" in message) and not (
        tmp_path / "out"
    ).exists()


def test_a_model_with_biases_does_not_go_back_to_a_llama_without(ours, tiny, tmp_path, capsys):
    """Sizes are alike, and Llama's class can have biases."""
    m, _ = ours("torch", "qwen2", num_key_value_heads=12)
    message = refused(capsys, "export", "--load-dir", m, "--save-dir", tmp_path / "out", "--hf-dir", tiny("llama"))
    assert "config.json a llama model (qkv_bias differs)" in message and not (tmp_path / "out").exists()


def test_the_family_is_that_of_hf_dir_where_the_architecture_is_the_same(ours, tmp_path):
    m, source = ours("torch", "mistral", num_key_value_heads=4)
    exports_exactly(foreign(m, tmp_path / "c"), source)


@pytest.mark.parametrize("fmt", FORMATS)
def test_padding_never_becomes_vocabulary(ours, tmp_path, capsys, fmt):
    m, source = ours(fmt, tp=2)
    root = foreign(m, tmp_path / "c", arguments(vocab_size=None))
    exports_exactly(root, source)
    verbs = {
        "transfer": ["--load-dir", root, "--save-dir", tmp_path / "t"],
        "prune": ["--load", root, "--save", tmp_path / "p", "--metric", "random", "--ffn-hidden-size-remain", "64"]
        + ["--tensor-model-parallel-size", "1"],
        "export": ["--load-dir", root, "--save-dir", tmp_path / "e"],
    }
    for verb, argv in verbs.items():
        message = refused(capsys, verb, *argv)
        assert "vocab_size (512 rows with padding)" in message and "--hf-dir" in message and "--vocab-size" in message
        assert run(verb, *argv, "--vocab-size", "307") == 0
        shutil.rmtree(argv[3])
        assert run(verb, *argv, "--hf-dir", source) == 0
    for made in ("t", "p"):
        checkpoint = megatron.open_checkpoint(tmp_path / made)
        assert checkpoint.config.vocab_size == 307 and (checkpoint.hf_folder / "tokenizer.json").is_file()
    assert run("export", "--load-dir", tmp_path / "t", "--save-dir", tmp_path / "out") == 0
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "out/model.safetensors", shallow=False)
    capsys.readouterr()
    assert run("inspect", root, "--json") == 0
    assert json.loads(capsys.readouterr().out)["shape"]["vocab_size"] == "not said"


FIRST = ["--tensor-model-parallel-size", "1"]
OPENING = {
    "evaluate": (["--load-dir", "{c}", "--data", "{text}", "--seq-length", "16", "--windows", "1"], []),
    "sample": (["--load", "{c}", "--save", "{out}.safetensors", "--nsamples", "2", "--seq-length", "8"], []),
    "score": (["--load", "{c}", "--save", "{out}", "--metrics", "magnitude", "--data", "{text}", "--nsamples", "2"], []),
    "vocab trim": (["--load-dir", "{c}", "--save-dir", "{out}", "--remain-vocab-size", "290"], []),
    "estimate": (["{c}"], []),
}


@pytest.mark.parametrize("verb", OPENING)
def test_every_verb_that_opens_a_checkpoint_takes_hf_dir(ours, tmp_path, verb):
    m, source = ours()
    (tmp_path / "text.txt").write_text("A small text for a small tokenizer. " * 40)
    root = foreign(m, tmp_path / "c", arguments(vocab_size=None, rotary_base=..., norm_epsilon=..., layernorm_epsilon=...))
    words = [word.format(c=root, out=tmp_path / "out", text=tmp_path / "text.txt") for word in OPENING[verb][0]]
    if verb != "estimate":
        assert run(*verb.split(), *words) == 2
    assert run(*verb.split(), *words, "--hf-dir", source) == 0


def test_a_rotary_base_that_nobody_says_is_asked_for(ours, tmp_path, capsys):
    m, source = ours("torch", "qwen2", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0})
    drop = arguments(rotary_base=..., use_rope_scaling=..., rotary_seq_len_interpolation_factor=..., rope_scaling_factor=...)
    root = foreign(m, tmp_path / "c", drop)
    message = refused(capsys, "export", "--load-dir", root, "--save-dir", tmp_path / "out")
    assert "does not say its model's rotary_base" in message and "--hf-dir, or say it: --rotary-base" in message
    exports_exactly(root, source)
    assert "rotary_base, rope_scaling: not among its stored arguments, taken from --hf-dir" in capsys.readouterr().err
    prune = ["prune", "--load", root, "--save", tmp_path / "p", "--metric", "random", "--ffn-hidden-size-remain", "64"]
    assert run(*prune, "--rotary-base", "500000") == 0
    assert "rope_scaling: said by nobody" in capsys.readouterr().err
    assert megatron.open_checkpoint(tmp_path / "p").config.rotary_base == 500000.0
    assert run("inspect", root, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rotary_base"], facts["rope_scaling"], facts["norm_epsilon"]) == ("not said", None, 1e-6)
    assert run("inspect", m, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize("whose", ["foreign", "ours"])
def test_flags_say_what_a_checkpoint_does_not_and_never_contradict_it(ours, tmp_path, capsys, whose):
    m, source = ours()
    root = m if whose == "ours" else foreign(m, tmp_path / "c")
    common = ["--load-dir", root, "--save-dir", tmp_path / "out"]
    message = refused(capsys, "export", *common, "--rotary-base", "5e5", "--vocab-size", "300")
    assert (
        "--rotary-base 500000.0, the checkpoint has 10000.0" in message and "--vocab-size 300, the checkpoint has 307" in message
    )
    assert "--believe without --hf-dir" in refused(capsys, "export", *common, "--believe", "hf")
    assert "--rotary-base" in refused(capsys, "export", *common, "--rotary-base", "nan")
    assert "no Megatron checkpoint" in refused(
        capsys,
        "vocab",
        "trim",
        "--load-dir",
        source,
        "--save-dir",
        tmp_path / "t",
        "--hf-dir",
        source,
        "--remain-vocab-size",
        "9",
    )
    assert run("export", *common, "--rotary-base", "10000", "--vocab-size", "307", "--hf-dir", source) == 0


def test_llama3_scaling_is_said_by_flags_of_prune(ours, tmp_path):
    m, _ = ours()
    root = foreign(m, tmp_path / "c", arguments(rotary_base=..., use_rope_scaling=..., rotary_seq_len_interpolation_factor=...))
    prune = ["prune", "--load", root, "--save", tmp_path / "p", "--metric", "random", "--ffn-hidden-size-remain", "64"]
    assert run(*prune, "--rotary-base", "500000", "--use-rope-scaling", "--rope-scaling-factor", "32") == 0
    scaling = megatron.open_checkpoint(tmp_path / "p").config.rope_scaling
    assert (scaling.kind, scaling.factor) == ("llama3", 32.0)


def test_the_constants_of_llama3_scaling_that_args_do_not_say_are_those_of_hf_dir(ours, tmp_path):
    rope = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    m, source = ours("torch", "llama", rope_parameters={**rope, "original_max_position_embeddings": 32})
    exports_exactly(foreign(m, tmp_path / "c"), source)


# ---------------------------------------------------------------------------------------------------- Megatron-Bridge


def test_a_checkpoint_of_bridge_is_read_from_its_run_config(ours, tmp_path):
    m, source = ours("torch_dist")
    root = bridge(m, tmp_path / "c", source)
    exports_exactly(root, source)
    assert run("transfer", "--load-dir", root, "--save-dir", tmp_path / "t") == 0
    checkpoint = megatron.open_checkpoint(tmp_path / "t")
    assert checkpoint.config == megatron.open_checkpoint(m).config
    assert filecmp.cmp(source / "tokenizer.json", checkpoint.hf_folder / "tokenizer.json", shallow=False)
    assert run("export", "--load-dir", root, "--save-dir", tmp_path / "alone") == 0  # its own tokenizer, a fresh config.json
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "alone/model.safetensors", shallow=False)
    assert json.loads((tmp_path / "alone/config.json").read_text())["model_type"] == "qwen2"


BAD_SECTIONS = {
    "  layernorm_zero_centered_gamma: true": "layernorm_zero_centered_gamma = True",
    "  final_logit_softcapping: 30.0": "final_logit_softcapping = 30.0: not an argument that is known",
    "  qk_l2_norm: !!python/object/apply:os.system ['touch executed']": "qk_l2_norm = a value of type",
    "  no_rope_freq: [0, 0, 0, 1]": "no_rope_freq",
    "  mrope_section: &a [*a]": "YAML|mrope_section",
    "  x: {a: [": "is not YAML",
    "  x: !!int many": "run_config.yaml: model.x",
    "  x: !!bool maybe": "run_config.yaml: model.x",
    '  x: !!int ""': "run_config.yaml: model.x",
    "  x: " + "9" * 5000: "run_config.yaml: model.x",
    "  \t": "is not YAML",
}


@pytest.mark.parametrize("line", BAD_SECTIONS)
def test_a_run_config_of_another_model_or_none_is_refused_and_nothing_is_built(ours, tmp_path, capsys, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    m, source = ours("torch_dist")
    message = refused(capsys, "inspect", bridge(m, tmp_path / "c", source, more=line))
    assert any(word in message for word in BAD_SECTIONS[line].split("|")) and not (tmp_path / "executed").exists()


def test_a_run_config_that_grows_without_end_is_read_in_no_time(ours, tmp_path):
    m, source = ours("torch_dist")
    bomb = "  a0: &a0 [x]\n" + "".join(f"  a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(30))
    root = bridge(m, tmp_path / "c", source, more=bomb)
    names = ",".join(f"a{n}" for n in range(31))
    exports_exactly(root, source, "--ignore-args", names)


@pytest.mark.parametrize("text", ["", "[]", "model: 3", "model: [a]", "\x00", "other: {}", "model: " + "{a: " * 20000])
def test_a_run_config_without_a_model_is_refused(ours, tmp_path, capsys, text):
    m, source = ours("torch_dist")
    root = bridge(m, tmp_path / "c", source)
    (root / "iter_0000000/run_config.yaml").write_text(text)
    assert "run_config.yaml" in refused(capsys, "inspect", root)
