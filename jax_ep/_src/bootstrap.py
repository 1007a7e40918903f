"""initialize, finalize, barrier: what several processes need before their first call. One process needs none of it.

Processes meet through JAX's coordination service (its key-value store and barriers), never through a collective:
a process that is missing becomes an error that names it, within `jax_ep.config.timeout`.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep._src import check, compat
from jax_ep._src.config import config

_state = {"initialized": False}


def initialize() -> None:
    """Makes the processes of a job known to each other; call it once after `jax.distributed.initialize()`.

    Every process calls it. It checks that all of them are there and run the same jax_ep and jaxlib, since ranks with
    different protocols would wait for each other for ever. In a single process, and when called again, it does nothing.
    After an error it may be called again: a process that came too late is then found.

    Raises:
      RuntimeError: `jax.distributed.initialize()` was not called although this is one of several processes; processes
        did not come within `jax_ep.config.timeout` seconds (they are named); or versions differ (both are named).

    Example:
      >>> jax.distributed.initialize()
      >>> jax_ep.initialize()
    """
    if _state["initialized"]:
        return
    client = compat.distributed_client()
    if client is not None:
        _meet(client, *compat.distributed_process())
    elif jax.process_count() > 1:
        raise RuntimeError(
            f"initialize: jax.distributed must be up in each of the {jax.process_count()} processes, got no coordination "
            "client. Call jax.distributed.initialize() before jax_ep.initialize()."
        )
    _state["initialized"] = True


def _meet(client: Any, me: int, num_processes: int) -> None:
    """Tells all processes this one's versions, and waits until each has told the same."""
    mine = {name: importlib.metadata.version(name) for name in ("jax-ep", "jaxlib")}
    client.key_value_set(_key(me), json.dumps(mine), allow_overwrite=True)
    deadline = time.monotonic() + config.timeout
    missing = []
    for process in range(num_processes):
        milliseconds = max(1, round(1000 * (deadline - time.monotonic())))
        try:
            theirs = json.loads(client.blocking_key_value_get(_key(process), milliseconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            missing.append(process)
            continue
        if theirs != mine:
            raise RuntimeError(
                f"initialize: all processes must run the same versions, got {_versions(theirs)} on process {process} and "
                f"{_versions(mine)} on process {me}. Install the same wheels everywhere."
            )
    if missing:
        raise RuntimeError(
            f"initialize: each of the {num_processes} processes must call jax_ep.initialize() within {config.timeout:g} s, "
            f"got no word from process {', '.join(map(str, missing))} on process {me}. Look at its log, or raise "
            "jax_ep.config.timeout."
        )


def _key(process: int) -> str:
    return f"jax_ep/initialize/{process}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def finalize() -> None:
    """Forgets what `initialize` set up. Waits for nobody, and may be called more than once, also by one process alone.

    Example:
      >>> jax_ep.finalize()
    """
    _state["initialized"] = False


def barrier(axis_name: str | tuple[str, ...]) -> jax.Array:
    """Waits until every rank along `axis_name` has come here; call it inside `jax.shard_map`.

    Args:
      axis_name: the mesh axis, or a tuple of them.

    Returns:
      s32[1], the number of ranks that came. XLA keeps only what is used: let later work depend on it, with
      `x, _ = jax.lax.optimization_barrier((x, token))`, or return it.

    Raises:
      NameError: the axis is not bound.

    Example:
      >>> came = jax.jit(jax.shard_map(lambda: jax_ep.barrier("expert"), mesh=mesh, in_specs=(), out_specs=P("expert")))()
    """
    names = check.axes("barrier", axis_name)
    ranks = compat.as_varying(jnp.ones(1, jnp.int32), names)
    return compat.as_varying(lax.psum(ranks, names), names)
