"""`python -m jax_ep doctor`: what this machine, or every process of a job, has for the kernels, and whether they work."""

import sys

from jax_ep._src.doctor import main

if __name__ == "__main__":
    sys.exit(main())
