"""Models whose layers differ, there and back, in the file that leaves with them, in transformers 4 and 5."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import run
from per_layer import like_tiny, mixed, weights_of, write_model, written_as
from tiny import state_dict

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId, head_of
from megatron_prune.checkpoint import huggingface
from megatron_prune.evaluation.one_layer import check_in_transformers
from megatron_prune.families.family import FAMILIES
from megatron_prune.families.form import shipped_files
from megatron_prune.importance.walk import Walk
from megatron_prune.runtime.ends import final_norm_factors, norm
from megatron_prune.runtime.huggingface_stage import HuggingFaceStage
from megatron_prune.runtime.stock_model import load_stock_model
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration

TOKENS = torch.randint(2, 307, (2, 20), generator=torch.Generator().manual_seed(2))
OLD = os.environ.get("TRANSFORMERS_4_PYTHON")
VLLM = os.environ.get("VLLM_PYTHON")


@pytest.fixture
def model(tiny, tmp_path, family) -> Path:
    """A directory of every kind of difference between layers."""
    return write_model(tmp_path / "hf", mixed(family), FAMILIES.get(family), beside=tiny(family))


def same_directory(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    assert [name for name in names if (left / name).read_bytes() != (right / name).read_bytes()] == []


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_there_and_back_bit_for_bit(model, tmp_path, ckpt_format):
    layout = ("--target-tensor-parallel-size", 2, "--ckpt-format", ckpt_format)
    assert run("convert", "--load-dir", model, "--save-dir", tmp_path / "m", *layout) == 0
    assert run("export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "back") == 0
    same_directory(model, tmp_path / "back")


def test_the_file_that_leaves_computes_what_the_formulas_say(model, family):
    config = mixed(family)
    found = load_stock_model(model, dtype=torch.float32)(TOKENS, use_cache=False).logits
    weights = {tensor: data.to(torch.bfloat16).double() for tensor, data in weights_of(config).items()}
    wanted = dense_logits(config, weights, TOKENS)
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_one_layer_at_a_time_gives_the_same(model, family):
    opened = huggingface.open_model(model)
    stage = HuggingFaceStage(opened.family, dtype=torch.float32, seq_length=TOKENS.shape[1])
    text = Calibration(tokens=TOKENS, lengths=torch.tensor([20, 20]), weights=torch.ones(2, dtype=torch.float64))
    walk = Walk(opened.tensors, text, stage, World())
    walk.to_the_end()
    head = opened.tensors.read_block(head_of(opened.config), range(opened.config.vocab_size))
    found = norm(walk.stream, opened.config) * final_norm_factors(opened.tensors).float() @ head.float().T
    wanted = load_stock_model(model, dtype=torch.float32)(TOKENS, use_cache=False).logits
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


_IN_TRANSFORMERS = """
import sys
from pathlib import Path

sys.modules["datasets"] = None  # not needed; one that is installed beside transformers 4 may be too new for it
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, saved, tokens, found = Path(sys.argv[1]), Path(sys.argv[2]), torch.load(sys.argv[3]), {}
assert "megatron_prune" not in sys.modules
load = lambda place, **more: AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **more).eval()
model = load(folder, torch_dtype=torch.float32)
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    found["logits"] = model(tokens).logits
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()
    assert torch.equal(model.lm_head(base(tokens).last_hidden_state), found["logits"])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # a shorter text beside a longer one
    settings = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    for more in ({}, {"num_beams": 3}):
        without = model.generate(tokens, use_cache=False, **settings, **more)
        assert torch.equal(model.generate(tokens, **settings, **more), without), more
    static = model.generate(tokens, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, model.generate(tokens, **settings))
    model.set_attn_implementation("eager")
    assert torch.allclose(model(tokens).logits, found["logits"], atol=1e-4)
    model.set_attn_implementation("sdpa")

model.train()
model(tokens, labels=tokens).loss.backward()
found["gradients"] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
model.zero_grad()
model.gradient_checkpointing_enable({"use_reentrant": False})
model(tokens, labels=tokens).loss.backward()
for name, parameter in model.named_parameters():
    assert torch.allclose(parameter.grad, found["gradients"][name], atol=1e-6), name
model.zero_grad()

model.save_pretrained(saved)
again = load(saved)
assert torch.equal(again(tokens).logits, found["logits"]) and not again.is_gradient_checkpointing
torch.save(found, sys.argv[4])

options = dict(max_steps=2, per_device_train_batch_size=1, gradient_checkpointing=True, use_cpu=True, learning_rate=0.1)
options |= dict(save_steps=2, report_to=[], disable_tqdm=True)
data = [{"input_ids": row, "labels": row} for row in tokens]
arguments = transformers.TrainingArguments(output_dir=str(saved.parent / "trained"), **options)
transformers.Trainer(model=again, args=arguments, train_dataset=data).train()
trained = load(saved.parent / "trained/checkpoint-2")
assert torch.equal(trained(tokens).logits, again.eval()(tokens).logits)
assert not torch.allclose(trained(tokens).logits, found["logits"], atol=1e-3)
"""


def in_fresh_process(python: str, folder: Path, place: Path) -> tuple[dict, Path]:
    """What a transformers computes that knows nothing of this package, and the directory that it saves."""
    place.mkdir()
    torch.save(TOKENS, place / "tokens")
    left = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HOME": str(place / "home")}
    command = [python, "-c", _IN_TRANSFORMERS, folder, place / "saved", place / "tokens", place / "found"]
    subprocess.run([*map(str, command)], check=True, env=left, cwd=place)
    return torch.load(place / "found"), place / "saved"


@pytest.mark.parametrize("version", [5, pytest.param(4, marks=pytest.mark.slow)])
def test_transformers_loads_runs_trains_and_saves_it(model, tmp_path, version):
    python = {5: sys.executable, 4: OLD}[version]
    if python is None:
        pytest.skip("TRANSFORMERS_4_PYTHON names no Python with transformers 4")
    found, saved = in_fresh_process(python, model, tmp_path / "fresh")
    ours = load_stock_model(model, dtype=torch.float32)
    assert torch.allclose(found["logits"], ours(TOKENS).logits, atol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in found["gradients"].values())
    assert run("convert", "--load-dir", saved, "--save-dir", tmp_path / "m") == 0
    assert huggingface.open_model(saved).config == huggingface.open_model(model).config
    before, after = state_dict(model), state_dict(saved)
    assert all(torch.equal(after[name], data.float()) for name, data in before.items())


@pytest.mark.skipif(OLD is None, reason="TRANSFORMERS_4_PYTHON names no Python with transformers 4")
@pytest.mark.slow
def test_no_stock_class_makes_up_what_is_not_there(tiny, tmp_path):
    config = dataclasses.replace(like_tiny("llama"), ffn_hidden_size=(96, 0, 96, 96))
    write_model(tmp_path / "hf", config, FAMILIES.get("llama"), beside=tiny("llama"))
    load = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for python in (OLD, sys.executable):
        assert subprocess.run([python, "-c", load, str(tmp_path / "hf")], env=env, capture_output=True).returncode != 0


# ---------------------------------------------------------------------------------------------------- what is not as it was


def refused(capsys, *argv) -> str:
    assert run(*argv) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama"])
def test_a_file_of_that_name_which_is_another_is_not_taken_for_ours(model, tmp_path, capsys):
    (code,) = [name for name in shipped_files() if (model / name).exists()]
    with open(model / code, "a") as file:
        file.write("print('evil')\n")
    said = refused(capsys, "convert", "--load-dir", model, "--save-dir", tmp_path / "m")
    assert "code of its own, which is never run" in said and f"a {code} that is another" in said
    (model / code).unlink()
    assert "is missing" in refused(capsys, "convert", "--load-dir", model, "--save-dir", tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"1": {"intermediate_size": 41, "num_key_value_heads": 2}},
            "model.layers.1.mlp.gate_proj.weight: shape (40, 48), needed",
        ),
        ({"1": {"intermediate_size": 40, "num_key_value_heads": 4}}, "model.layers.1.self_attn.k_proj.weight"),
        ({"0": {}}, "model.layers.0.self_attn.q_proj.weight: missing"),
        ({"3": {"skip": ["attention"]}}, "model.layers.3.self_attn.q_proj.weight: not a tensor"),
    ],
)
def test_a_field_that_contradicts_the_tensors_is_refused_with_the_layer(model, tmp_path, capsys, change, words):
    said = json.loads((model / "config.json").read_text())
    said["per_layer_config"] |= change
    (model / "config.json").write_text(json.dumps(said))
    assert words in refused(capsys, "convert", "--load-dir", model, "--save-dir", tmp_path / "m")


@pytest.mark.parametrize("family", ["llama"])
def test_what_cannot_say_the_shape_is_refused_with_the_layers(model, tmp_path, capsys):
    assert run("convert", "--load-dir", model, "--save-dir", tmp_path / "m") == 0
    export = ("export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "out", "--target-family")
    said = refused(capsys, *export, "llama")
    assert "no attention in layer 0" in said and "--target-family llama-per-layer" in said
    assert "first layer without attention" in refused(capsys, *export, "nemotron-nas")
    assert not (tmp_path / "out").exists()
    assert run(*export, "mistral-per-layer") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mistral"
    tensors = state_dict(model)
    assert {name: data.tolist() for name, data in state_dict(tmp_path / "out").items()} == {
        name: data.tolist() for name, data in tensors.items()
    }


# ------------------------------------------------------------------------------------------------------------ nemotron-nas


def with_attention_first(family: str):
    """All that nemotron-nas can say, one width with a factor."""
    return dataclasses.replace(
        like_tiny(family, num_key_value_heads=6),
        ffn_hidden_size=(256, 40, 0, 96),
        num_attention_heads=(12, 0, 12, 12),
        num_query_groups=(2, 0, 4, 6),
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nemotron_nas_there_and_back_and_into_the_other_form(tiny, tmp_path, family):
    config = with_attention_first(family)
    source = write_model(tmp_path / "hf", config, written_as(family, "nemotron-nas"), beside=tiny(family))
    assert check_in_transformers(huggingface.open_model(source))[1] == []
    assert run("convert", "--load-dir", source, "--save-dir", tmp_path / "m", "--target-tensor-parallel-size", 2) == 0
    export = ("export", "--load-dir", tmp_path / "m", "--save-dir")
    assert run(*export, tmp_path / "back") == 0
    same_directory(source, tmp_path / "back")
    assert run(*export, tmp_path / "per_layer", "--target-family", f"{family}-per-layer") == 0
    assert not (tmp_path / "per_layer/configuration_nemotron_nas.py").exists()
    other = huggingface.open_model(tmp_path / "per_layer")
    assert other.config == config
    assert torch.equal(load_stock_model(source)(TOKENS).logits, load_stock_model(other.path)(TOKENS).logits)
    assert run("convert", "--load-dir", tmp_path / "per_layer", "--save-dir", tmp_path / "m2") == 0
    assert run("export", "--load-dir", tmp_path / "m2", "--save-dir", tmp_path / "nas", "--target-family", "nemotron-nas") == 0
    assert huggingface.open_model(tmp_path / "nas").config == config
    assert json.loads((tmp_path / "nas/config.json").read_text())["block_configs"][0]["ffn"]["ffn_mult"] == 8.0


_AS_VLLM_READS = """
import sys
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
heads = config.num_attention_heads
print([0 if block.attention.no_op else heads // block.attention.n_heads_in_group for block in config.block_configs])
print([0 if block.ffn.no_op else block.ffn.intermediate_size for block in config.block_configs])
"""


@pytest.mark.parametrize("version", [5, pytest.param(4, marks=pytest.mark.slow)])
def test_the_configuration_that_leaves_is_read_as_attributes(tiny, tmp_path, version):
    python = {5: sys.executable, 4: OLD}[version]
    if python is None:
        pytest.skip("TRANSFORMERS_4_PYTHON names no Python with transformers 4")
    config = with_attention_first("llama")
    folder = write_model(tmp_path / "hf", config, written_as("llama", "nemotron-nas"), beside=tiny("llama"))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([python, "-c", _AS_VLLM_READS, str(folder)], env=env, check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [str(list(config.num_query_groups)), str(list(config.ffn_hidden_size))]


_IN_VLLM = """
import json
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    model = LLM(sys.argv[1], trust_remote_code=True, **settings)
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    (answer,) = model.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], greedy)
    print("TOKENS", list(answer.outputs[0].token_ids))
"""


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="VLLM_PYTHON names no Python with vLLM")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_vllm_goes_on_as_the_formulas_do(tiny, tmp_path, family):
    config = dataclasses.replace(
        with_attention_first(family),
        hidden_size=384,
        kv_channels=64,  # vLLM's kernels have sizes of their own
        num_attention_heads=(6, 0, 6, 6),
        num_query_groups=(2, 0, 3, 6),
    )
    folder = write_model(tmp_path / "hf", config, written_as(family, "nemotron-nas"), beside=tiny(family), dtype=torch.float32)
    tokens = TOKENS[0, :7].tolist()
    (tmp_path / "run.py").write_text(_IN_VLLM)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([VLLM, tmp_path / "run.py", folder, str(tokens)], env=env, check=True, capture_output=True, text=True)
    weights = {tensor: data.double() for tensor, data in weights_of(config).items()}
    for _ in range(10):
        tokens.append(int(dense_logits(config, weights, torch.tensor([tokens]))[0, -1].argmax()))
    assert f"TOKENS {tokens[7:]}" in done.stdout


def test_the_code_of_others_is_never_run(tiny, tmp_path):
    """NVIDIA's own checkpoints name theirs; they are read, moved and run without it."""
    folder = write_model(
        tmp_path / "hf", with_attention_first("llama"), written_as("llama", "nemotron-nas"), beside=tiny("llama")
    )
    (folder / "configuration_nemotron_nas.py").unlink()
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    said = json.loads((folder / "config.json").read_text())
    said["auto_map"] = {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    }
    said |= {"intermediate_size": None, "num_key_value_heads": None}
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    assert load_stock_model(folder)(TOKENS).logits.isfinite().all()
    assert run("convert", "--load-dir", folder, "--save-dir", tmp_path / "m") == 0
    assert run("export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "back") == 0
    same_directory(folder, tmp_path / "back")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------ the formulas, dense


def dense_logits(config: ModelConfig, weights: dict[TensorId, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Float64 logits [samples, tokens, vocabulary], written out: a layer adds what its blocks make, and what it lacks adds nothing."""
    stream = weights[TensorId("embedding")][tokens] * (config.hidden_size**0.5 if config.scaled_embedding else 1.0)
    for number in range(config.num_layers):
        layer, at = config.of_layer(number), lambda role: weights.get(TensorId(role, number))
        for present, block, before, after in (
            (layer.num_attention_heads, dense_attention, "input_norm", "o_norm"),
            (layer.ffn_hidden_size, dense_mlp, "post_norm", "down_norm"),
        ):
            if present:
                made = block(layer, at, dense_norm(config, stream, at(before)))
                stream = stream + (made if at(after) is None else dense_norm(config, made, at(after)))
    head = weights[TensorId("embedding" if config.tie_embeddings else "output")]
    return dense_norm(config, stream, weights[TensorId("final_norm")]) @ head.T


def dense_norm(config, x, weight):
    return (
        x
        / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
        * (weight + (1.0 if config.zero_centered_norms else 0.0))
    )


def dense_mlp(layer, at, x):
    act = {"silu": torch.nn.functional.silu, "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh")}
    return (act[layer.activation](x @ at("gate").T) * (x @ at("up").T)) @ at("down").T


def dense_attention(layer, at, x):
    d, samples, length = layer.kv_channels, *x.shape[:2]
    heads = {}
    for role, count in (("q", layer.num_attention_heads), ("k", layer.num_query_groups), ("v", layer.num_query_groups)):
        bias = at(role + "_bias")
        made = x @ at(role).T + (0.0 if bias is None else bias)
        made = made.view(samples, length, count, d).transpose(1, 2)
        if at(role + "_norm") is not None:
            made = dense_norm(layer, made, at(role + "_norm"))
        heads[role] = made if role == "v" else turned(made, layer.rotary_base)
    each = layer.num_attention_heads // layer.num_query_groups
    k, v = (heads[role].repeat_interleave(each, dim=1) for role in "kv")
    scores = heads["q"] @ k.transpose(2, 3) * (layer.softmax_scale or d**-0.5)
    apart = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (apart >= 0) & (apart < (layer.sliding_window or length))
    made = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return made.transpose(1, 2).reshape(samples, length, -1) @ at("o").T


def turned(x, base):
    d, length = x.shape[-1], x.shape[-2]
    angles = torch.arange(length).double()[:, None] / base ** (torch.arange(0, d, 2).double() / d)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
