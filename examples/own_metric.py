"""A metric of one's own in ten lines: feed-forward channels by the largest of their weights.

python examples/own_metric.py [MODEL]
"""

import sys

import megatron_prune as mp

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"


@mp.metric("fourth_powers", axes=["ffn"])
def fourth_powers(weight):
    """What every weight contributes to the channel that owns it."""
    return weight**4


plan = mp.plan(name, {"ffn_hidden_size": 48}, metric="fourth_powers", refit=False)
print(plan.summary(), "; layer 0 keeps", plan.layers[0].ffn[:8], "…")
