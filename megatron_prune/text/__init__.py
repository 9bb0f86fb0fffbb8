"""Text in, batches of tokens out: sources (one file each in ``readers/``), their mixture, and windows to measure on."""
