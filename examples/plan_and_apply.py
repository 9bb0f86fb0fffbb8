"""Measure once, plan twice, and cut by the plan that was looked at.

python examples/plan_and_apply.py [MODEL] [TEXT.txt]
"""

import sys
import tempfile
from pathlib import Path

import megatron_prune as mp

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
data = sys.argv[2] if len(sys.argv) > 2 else "wikitext2"
work = Path(tempfile.mkdtemp())

scores = mp.score(name, work / "scores", data=data, nsamples=4, seq_length=32)
for ratio in (0.1, 0.25):
    plan = mp.plan(name, {"ratio": ratio}, scores=scores)
    print(f"{ratio:.0%} of the parameters:", plan.summary())

small = mp.apply(name, plan, save=work / "small")  # nothing is re-fitted: what stays keeps its bits
before, after = (mp.evaluate(model, data, seq_length=32, windows=4)["perplexity"] for model in (name, small))
print(f"perplexity {before:.1f} → {after:.1f}")
