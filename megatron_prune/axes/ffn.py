"""Feed-forward channels: a row of gate, the same row of up, the same column of down. They may stand in any order."""

from megatron_prune.axes.axis import AXES, Axis

AXES.register("ffn")(Axis(name="ffn", per_layer=True, sharded=True, owns=lambda config: {"ffn": 1}))
