"""Bytes: where each tensor of a checkpoint lies, in every format, and streams that read, cut and write them.

A format is a map from role tensors to blocks of files (:class:`~megatron_prune.checkpoint.tensor_map.TensorMap`). Opening a
checkpoint yields its map; creating one lays out its files empty and yields the map of where to write. Everything else
(conversion, pruning, export, change of parallel layout) is one loop over role tensors in ``stream.py``.
"""
