"""Query heads: ``head_dim`` rows of q, as many columns of o. Cut equally inside every KV group, and dealt out with it."""

from megatron_prune.axes.axis import AXES, Axis

AXES.register("head")(
    Axis(
        name="head",
        per_layer=True,
        sharded=True,
        owns=lambda config: {"head": config.size("head_dim")},
        dealt_as="kv_head",
    )
)
