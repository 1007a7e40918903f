"""`python -m jax_ep doctor`: what this machine, or every process of a job, has for the kernels, and whether they work."""

import os
import sys

from jax_ep._src.doctor import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if code:
        os._exit(code)  # an ordinary exit would wait for the processes that are missing
