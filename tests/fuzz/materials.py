"""What commands read: a tiny model in every form, and what can be made of it, each made when it is first asked for."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Callable

from child import run
from tiny import build_tiny

WORDS = "the a small text for tokenizer of end time make find long day old new work life hand".split()
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


class Materials:
    """Args:
    root: an empty directory.
    """

    def __init__(self, root: Path):
        self.root = root / "materials"
        self.root.mkdir()
        for module in ("torch", "transformers", "safetensors", "tokenizers", "pydantic", "megatron.core", "tiny"):
            __import__(module)  # once, not in every child

    def get(self, name: str) -> Path:
        """A material by its name: a file, a directory, or the prefix of a pair."""
        made = self.root / name
        if not list(self.root.glob(f"{name}*")):
            _MAKERS[name](self, made)
            assert list(self.root.glob(f"{name}*")), name
        return made

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of a material that a case may damage."""
        self.get(name)
        for path in self.root.glob(f"{name}*"):
            if path.name == name or path.name.startswith(f"{name}."):
                shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copy(path, folder / path.name)
        return folder / name

    def command(self, *words: object) -> None:
        ended = run([str(word) for word in words], self.root)
        assert ended.code == 0, f"{words}: {ended.said}"


def _text(_: Materials, path: Path) -> None:
    draw = random.Random(3)
    path.write_text("\n\n".join(" ".join(draw.choice(WORDS) for _ in range(60)) for _ in range(60)))


def _jsonl(_: Materials, path: Path) -> None:
    draw = random.Random(4)
    lines = [json.dumps({"text": " ".join(draw.choice(WORDS) for _ in range(80))}) for _ in range(40)]
    path.write_text("\n".join(lines) + "\n")


def _model(_: Materials, path: Path) -> None:
    build_tiny(path, "qwen2", **TINY)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def _evaluation(_: Materials, path: Path) -> None:
    path.write_text(json.dumps({"perplexity": 12.5, "text": "t", "windows": 4, "seq_length": 32}))


FEW = ["--nsamples", 4, "--seq-length", 16]
CUT = ["--ffn_hidden_size_remain", 32]

_MAKERS: dict[str, Callable[[Materials, Path], None]] = {
    "text.txt": _text,
    "lines.jsonl": _jsonl,
    "hf": _model,
    "m": lambda m, p: m.command("convert", "--load-dir", m.get("hf"), "--save-dir", p),
    "legacy": lambda m, p: m.command("convert", "--load-dir", m.get("hf"), "--save-dir", p, "--ckpt-format", "torch"),
    "scores": lambda m, p: m.command(
        "score", "--load", m.get("m"), "--save", p, "--data", m.get("text.txt"), "--metrics", "fisher", "activation", *FEW
    ),
    "samples.safetensors": lambda m, p: m.command("sample", "--load", m.get("m"), "--save", p, *FEW),
    "plan.json": lambda m, p: m.command(
        *("prune", "--load", m.get("m"), "--save", m.root / "cut", "--metric", "magnitude", "--save-plan", p, *CUT)
    ),
    "sizes.json": lambda m, p: p.write_text(json.dumps({"ffn_hidden_size_remain": 32, "drop_layers": [1]})),
    "pair": lambda m, p: (
        m.command(
            "preprocess", "--input", m.get("lines.jsonl"), "--tokenizer", m.get("hf"), "--output-prefix", p, "--workers", 1
        ),
        [path.rename(str(path).replace("pair_text_document", "pair")) for path in m.root.glob("pair_text_document.*")],
    ),
    "counts": lambda m, p: m.command(
        "vocab", "count", "--tokenizer", m.get("hf"), "--input", m.get("text.txt"), "--output", p, "--workers", 1
    ),
    "vocab_plan.json": lambda m, p: m.command(
        *("vocab", "select", "--load-dir", m.get("hf"), "--counts", m.get("counts"), "--remain-vocab-size", 300, "--save-plan", p)
    ),
    "trimmed": lambda m, p: m.command(
        *("vocab", "trim", "--load-dir", m.get("hf"), "--plan", m.get("vocab_plan.json"), "--save-dir", p)
    ),
    "teacher": lambda m, p: m.command(
        *("teach", "--load", m.get("m"), "--save", p, "--data-path", m.get("pair"), "--split", "80,20,0", "--train-iters", 2),
        *("--global-batch-size", 2, "--seq-length", 16, "--eval-iters", 1, "--top-k", 4),
    ),
    "evaluation.json": _evaluation,
}
