"""Run by a Python that has lm-eval: ``lm_eval_scores.py PAIRS FOLDER…``; prints the log-likelihoods that its class for transformers
finds of JSON pairs (context, continuation), with the tokens it split them into, a line of JSON for each folder."""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def scores(folder, pairs):
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2)
    asked = [Instance("loglikelihood", {}, tuple(pair), number) for number, pair in enumerate(pairs)]
    found = [value for value, _ in model.loglikelihood(asked)]
    return {"scores": found, "tokens": [model._encode_pair(*pair) for pair in pairs]}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for path in sys.argv[2:]:
        try:
            found = scores(path, given)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps({"folder": path, **found}), flush=True)
