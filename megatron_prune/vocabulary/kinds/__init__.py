"""The kinds of tokenizer files: one a module, found by :data:`megatron_prune.vocabulary.tokenizer_file.KINDS`."""
