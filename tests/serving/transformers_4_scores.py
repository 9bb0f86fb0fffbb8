"""Run by a Python that has transformers 4: ``transformers_4_scores.py TOKENS FOLDER…``; prints what ``vllm_scores.py`` does."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def scores(folder, tokens):
    # our own file beside a model whose layers differ
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    if lost := [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[kind]]:
        raise ValueError(f"weights of other names or shapes: {lost}")
    with torch.no_grad():
        found = model.eval()(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return [found[place, token].item() for place, token in enumerate(tokens[1:])]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for path in sys.argv[2:]:
        try:
            found = {"scores": scores(path, given)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps({"folder": path, **found}), flush=True)
