"""A model that is mostly vocabulary: Gemma 3 270M trimmed, then pruned, one table.

    python scripts/gemma3_270m.py gemma
    python benchmarks/gemma3.py gemma --train TEXT --texts TEXT_A TEXT_B

Bits per byte compare models whose tokenizers spell differently: the loss of all tokens of the same bytes, over their number. A
window is <bos> and 511 tokens, without which this model is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

BYTES = 60_000
"""Of each text that is looked at, from its beginning."""
WINDOW = 511


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", required=True, help="text that tokens are counted in and the cut is fitted to")
    parser.add_argument("--texts", nargs="+", required=True, help="texts that are compared")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=256)
    options = parser.parse_args()
    print("| model | parameters | " + " | ".join(f"bits per byte, {Path(text).name}" for text in options.texts) + " |")
    print("|---|---|" + "---|" * len(options.texts))
    row("as it is", options.model, options.texts)
    with tempfile.TemporaryDirectory() as work:
        counts, trimmed, cut = (Path(work) / name for name in ("counts", "trimmed", "cut"))
        run("vocab", "count", "--tokenizer", options.model, "--input", options.train, "--output", counts)
        kept = ("--remain-vocab-size", options.tokens, "--save", trimmed)
        run("vocab", "trim", "--load", options.model, "--counts", counts, *kept)
        row(f"{options.tokens} tokens", trimmed, options.texts)
        text = ("--data", options.train, "--nsamples", options.nsamples, "--seq-length", options.seq_length)
        where = ("--load", trimmed, "--save", cut)
        run("prune-hf", *where, "--ratio", options.ratio, *text)
        row(f"and a share of {options.ratio:g} pruned ({shape(cut)})", cut, options.texts)


def run(*words: object) -> None:
    """A verb of the command line; its own messages go to standard error."""
    subprocess.run([sys.executable, "-m", "megatron_prune", *map(str, words)], check=True, stdout=sys.stderr)


def shape(folder: Path) -> str:
    """The sizes that a plan changed."""
    plan = json.loads((folder / "plan.json").read_text())
    return ", ".join(f"{name} {plan['old'][name]} → {new}" for name, new in plan["new"].items() if plan["old"][name] != new)


def row(name: str, folder: Path, texts: list[str]) -> None:
    """A line of the table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = " | ".join(f"{bits_per_byte(model, tokenizer, text):.3f}" for text in texts)
    print(f"| {name} | {model.num_parameters() / 1e6:.1f} M | {found} |", flush=True)


@torch.no_grad()
def bits_per_byte(model, tokenizer, text: str) -> float:
    """Loss of all tokens of a text's first bytes, in bits, over the number of bytes."""
    data = Path(text).read_bytes()[:BYTES].decode("utf-8", "ignore")
    ids, total = tokenizer(data, add_special_tokens=False).input_ids, 0.0
    for start in range(0, len(ids), WINDOW):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + WINDOW]]])
        logits = model(window).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return total / math.log(2) / len(data.encode())


if __name__ == "__main__":
    main()
