"""initialize, finalize: what several processes need before their first call. One process needs neither.

Processes meet through JAX's coordination service (its key-value store and barriers), never through a collective:
a process that is missing becomes an error that names it, within `jax_ep.config.timeout`.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax

from jax_ep._src import compat, coordination, internode, peers, targets
from jax_ep._src.config import config

_state = {"initialized": False, "resumed": 0}


def initialize() -> None:
    """Makes the processes of a job known to each other; call it once after `jax.distributed.initialize()`.

    Every process calls it. It checks that all of them are there and run the same jax_ep and jaxlib, since ranks with
    different protocols would wait for each other for ever. On GPUs the processes of one host then map each other's memory,
    so that kernels serve groups that span them; where that is not possible XLA's collectives do, and a warning says why.
    Where there are several hosts, NVSHMEM is set up for groups that span those; that it is missing is told when such a group
    is first compiled.

    In a single process, and when called again, it does nothing. After an error of its own it may be called again: a process
    that came too late is then found. After a call over several processes has failed, every later one fails too, until every
    process has called `initialize` again: the next call of each is then the first of a new beginning. A process whose devices
    are all in `jax_ep.config.dead_devices`, which the others have set alike, is not waited for; nor does a new value of it
    hold over several processes before that.

    Raises:
      RuntimeError: `jax.distributed.initialize()` was not called although this is one of several processes; processes
        did not come within `jax_ep.config.timeout` seconds (they are named); or versions differ (both are named).

    Example:
      >>> jax.distributed.initialize()
      >>> jax_ep.initialize()
    """
    client = compat.distributed_client()
    me, num_processes = compat.distributed_process()
    if client is not None and num_processes > 1:
        if not _state["initialized"]:
            _meet(client, me, num_processes)
            peers.exchange(client, me, num_processes, peers.CudaMemory())
            internode.exchange(client, me, num_processes)
        _resume(client, me, num_processes)
    elif client is None and not _state["initialized"] and jax.process_count() > 1:
        raise RuntimeError(
            f"initialize: jax.distributed must be up in each of the {jax.process_count()} processes, got no coordination "
            "client. Call jax.distributed.initialize() before jax_ep.initialize()."
        )
    _state["initialized"] = True


def _meet(client: Any, me: int, num_processes: int) -> None:
    """Tells all processes this one's versions, and waits until each has told the same."""
    mine = {name: importlib.metadata.version(name) for name in ("jax-ep", "jaxlib")}
    mine |= {name: str(getattr(config, name)) for name in ("max_groups", "arena_bytes")}
    for process, theirs in enumerate(coordination.gather(client, "versions", mine, me, num_processes)):
        if theirs != mine:
            raise RuntimeError(
                f"initialize: all processes must run the same versions, got {_versions(theirs)} on process {process} and "
                f"{_versions(mine)} on process {me}. Install the same wheels everywhere, with the same jax_ep.config."
            )


def _resume(client: Any, me: int, num_processes: int) -> None:
    """After a failure, here or where somebody says so: all processes agree on the generation in which calls go on."""
    topic = f"resume {_state['resumed']}"
    if targets.has_failed_spanning() or coordination.somebody_spoke(client, topic):
        generations = coordination.gather(
            client, topic, targets.spanning_generation(), me, num_processes, without=_dead_processes()
        )
        targets.resume(1 + max(generations))
        _state["resumed"] += 1


def _dead_processes() -> set[int]:
    """The processes that have devices, all of them masked."""
    if not config.dead_devices:
        return set()
    devices = jax.devices()
    living = {device.process_index for device in devices if device.id not in config.dead_devices}
    return {device.process_index for device in devices} - living


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def finalize() -> None:
    """Ends what `initialize` began. Waits for nobody, and may be called more than once, also by one process alone.

    Memory that peers have mapped stays until the process ends: they may still be writing to it.

    Example:
      >>> jax_ep.finalize()
    """
    peers.forget()
    _state["initialized"] = False
