"""The command line: words → options, one step, and how it ended."""
