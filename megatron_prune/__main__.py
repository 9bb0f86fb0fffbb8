"""``python -m megatron_prune <verb>``, the form that torchrun launches."""

from megatron_prune.cli.main import main

if __name__ == "__main__":
    main()
