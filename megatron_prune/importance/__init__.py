"""How much each unit matters: metrics, and the runner that applies them to a rank's shards."""
