"""What two processes see of initialize and finalize, one step after another; test_bootstrap.py says what is right."""

import importlib.metadata
import itertools
import time

from jax._src import distributed, xla_bridge

import jax_ep

_meetings = itertools.count()


def both_here():
    """Both processes have come here; no part of what is tested."""
    distributed.global_state.client.wait_at_barrier(f"test/{next(_meetings)}", 60_000)


def error_of_initialize():
    try:
        jax_ep.initialize()
    except RuntimeError as error:
        return str(error)
    return None


def timed(f):
    start = time.monotonic()
    result = f()
    return result, time.monotonic() - start


def steps():
    me = distributed.global_state.process_id
    seen = {}

    if me == 0:
        jax_ep.config.timeout = 1.5
        seen["alone"], seen["alone_seconds"] = timed(error_of_initialize)
        jax_ep.config.timeout = 60.0
    seen["backend_started"] = xla_bridge.backends_are_initialized()
    both_here()

    seen["together"] = error_of_initialize()  # process 0 for the second time
    both_here()
    seen["again"] = error_of_initialize()
    if me == 0:
        _, seen["finalize_seconds"] = timed(jax_ep.finalize)
        jax_ep.finalize()
        seen["after_finalize_alone"] = error_of_initialize()
    both_here()

    jax_ep.finalize()
    installed = importlib.metadata.version
    if me == 1:
        importlib.metadata.version = lambda name: "9.9.9" if name == "jax-ep" else installed(name)
        seen["versions"] = error_of_initialize()
    both_here()
    if me == 0:
        seen["versions"] = error_of_initialize()
    both_here()
    if me == 1:
        importlib.metadata.version = installed
        seen["reinstalled"] = error_of_initialize()
    both_here()
    if me == 0:
        seen["reinstalled"] = error_of_initialize()
    return seen
