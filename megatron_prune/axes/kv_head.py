"""KV groups: a key and a value head with all the query heads that read them."""

from megatron_prune.axes.axis import AXES, Axis

AXES.register("kv_head")(
    Axis(
        name="kv_head",
        field="num_query_groups",
        per_layer=True,
        sharded=True,
        owns=lambda config: {"kv_head": config.kv_channels, "head": config.heads_per_group * config.kv_channels},
    )
)
