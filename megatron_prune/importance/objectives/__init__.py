"""Objectives: one file each, found by :data:`megatron_prune.importance.objective.OBJECTIVES`."""
