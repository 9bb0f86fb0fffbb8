"""KV groups: a key and a value head with all the query heads that read them."""

from megatron_prune.axes.axis import AXES, Axis

AXES.register("kv_head")(
    Axis(
        name="kv_head",
        per_layer=True,
        sharded=True,
        owns=lambda config: {"kv_head": config.size("head_dim"), "head": config.heads_per_group * config.size("head_dim")},
    )
)
