"""Channels of the residual stream: the same ones on every rank and in every layer."""

from megatron_prune.axes.axis import AXES, Axis

AXES.register("hidden")(Axis(name="hidden", per_layer=False, sharded=False, owns=lambda config: {"hidden": 1}))
