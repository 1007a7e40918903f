"""Workers that go wrong, for test_launch.py."""

import time

import jax


def one_fails_one_hangs():
    if jax.process_index() == 1:
        raise ValueError("as told")
    time.sleep(600)
