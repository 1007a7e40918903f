"""Benchmarks, run from the repository's root: `python -m benchmarks.exchange`, `python -m benchmarks.summary`.

The named cases are the tests' (tests/cases.py). jax_ep is the installed one: the sources beside this folder are not built.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT:  # put there by `python -m`
    del sys.path[0]
sys.path += [str(ROOT), str(ROOT / "tests")]
