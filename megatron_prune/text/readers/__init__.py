"""Sources of samples: one file each, found by :data:`megatron_prune.text.reader.READERS`."""
