"""Sources of samples: one file each, found by :data:`megatron_prune.calibration.reader.READERS`."""
