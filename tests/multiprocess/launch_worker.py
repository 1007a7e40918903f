"""Workers that go wrong or tell how they were started, for test_launch.py."""

import time

import jax


def one_fails_one_hangs():
    if jax.process_index() == 1:
        raise ValueError("as told")
    time.sleep(600)


def all_hang():
    time.sleep(600)


def chosen_gpus():
    return jax.config.values["jax_cuda_visible_devices"]
