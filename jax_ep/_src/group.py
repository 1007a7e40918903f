"""Which devices exchange with which: a group is the devices along the expert-parallel axes, rank by rank.

Found while a call is lowered, when the mesh is known; ffi/group/ makes its memory then and there. The call carries the
devices as an attribute and nothing else: no ids of hidden state, so that a cached executable finds its group again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from jax_ep._src import targets
from jax_ep._src.config import config

Ordinals = tuple[tuple[int, ...], ...]


def along(axis_context: Any, axis_name: tuple[str, ...]) -> Ordinals | None:
    """CUDA ordinals of each group along the axes, rank by rank, their memory ready; None where kernels cannot serve.

    That is: no devices are known (export), not GPUs of this process, or GPUs that do not reach each other's memory.
    """
    mesh = getattr(axis_context, "mesh", None)
    if not isinstance(mesh, jax.sharding.Mesh) or mesh.empty:
        return None
    devices = np.moveaxis(mesh.devices, [mesh.axis_names.index(name) for name in axis_name], range(len(axis_name)))
    num_ranks = int(np.prod(devices.shape[: len(axis_name)]))
    return _of_devices(tuple(map(tuple, devices.reshape(num_ranks, -1).T)), config.timeout)


@functools.lru_cache(maxsize=256)
def _of_devices(groups: tuple[tuple[Any, ...], ...], timeout: float) -> Ordinals | None:
    devices = [device for group in groups for device in group]
    if any(device.platform != "gpu" or device.process_index != jax.process_index() for device in devices):
        return None
    ordinals = tuple(tuple(device.local_hardware_id for device in group) for group in groups)
    if any(ordinal is None for group in ordinals for ordinal in group):
        return None
    if not all(targets.have_peer_access(list(group)) for group in ordinals):
        return None
    targets.set_timeout(timeout)
    for group in ordinals:
        targets.make_group(list(group))
    return ordinals


def make_arenas(groups: Ordinals, window_bytes: int) -> None:
    """Sees to the memory of low-latency calls that need so many bytes of a window; kept for the process's life."""
    for ordinals in groups:
        targets.make_arenas(list(ordinals), window_bytes)
