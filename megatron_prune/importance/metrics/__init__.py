"""Metrics: one file each, found by :data:`megatron_prune.importance.metric.METRICS`."""
