"""The prunable directions: one file each, found by :data:`axis.AXES`."""
