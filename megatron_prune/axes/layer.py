"""Whole layers. A layer owns every tensor in it; ``importance`` scores it as a whole."""

from megatron_prune.axes.axis import AXES, Axis

AXES.register("layer")(Axis(name="layer", per_layer=False, sharded=False, owns=lambda config: {}))
