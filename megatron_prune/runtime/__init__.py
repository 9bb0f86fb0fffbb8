"""torchrun and megatron-core: processes, device, layer specs, and the model built from a checkpoint."""
