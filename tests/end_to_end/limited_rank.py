"""What torchrun starts for ``test_bad_input.py``: a verb, on a machine where rank 1 alone may write no large file.

A quota is a failure that only one rank meets, in the middle of its writing.
"""

import os
import resource
import sys

from megatron_prune.cli.main import main

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    main(sys.argv[1:])
