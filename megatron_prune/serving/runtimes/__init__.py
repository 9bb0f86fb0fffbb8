"""What serves models: one file each, found by :data:`megatron_prune.serving.runtime.RUNTIMES`."""
