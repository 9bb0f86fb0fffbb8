"""Query heads: ``head_dim`` rows of q, as many columns of o. Cut equally inside every KV group."""

from megatron_prune.axes.axis import AXES, Axis

AXES.register("head")(
    Axis(
        name="head",
        field="num_attention_heads",
        per_layer=True,
        sharded=True,
        owns=lambda config: {"head": config.kv_channels},
    )
)
