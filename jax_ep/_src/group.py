"""Which devices exchange with which: a group is the devices along the expert-parallel axes, rank by rank.

Found while a call is lowered, when the mesh is known; ffi/group/ makes its memory then and there, or takes it from what
`initialize` exchanged (peers.py). The call carries JAX's ids of the devices as an attribute and nothing else: the same in
every process, and no ids of hidden state, so that a cached executable finds its group again.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import numpy as np

from jax_ep._src import arenas, compat, coordination, internode, peers, targets

Groups = tuple[peers.Group, ...]

_over_nodes: set[Groups] = set()  # that the kernels of ffi/internode serve


def along(axis_context: Any, axis_name: tuple[str, ...]) -> Groups | None:
    """Device ids of each group along the axes, rank by rank, their memory ready; None where kernels cannot serve.

    That is: no devices are known (export), not GPUs, or GPUs that do not reach each other's memory. In every process of a
    program the answer is the same.
    """
    mesh = getattr(axis_context, "mesh", None)
    if not isinstance(mesh, jax.sharding.Mesh) or mesh.empty:
        return None
    devices = np.moveaxis(mesh.devices, [mesh.axis_names.index(name) for name in axis_name], range(len(axis_name)))
    num_ranks = int(np.prod(devices.shape[: len(axis_name)]))
    return _of_devices(tuple(map(tuple, devices.reshape(num_ranks, -1).T)), peers.world(), internode.world())


@functools.lru_cache(maxsize=256)
def _of_devices(
    device_groups: tuple[tuple[Any, ...], ...], world: peers.World | None, nodes: internode.World | None = None
) -> Groups | None:
    devices = [device for group in device_groups for device in group]
    if any(device.platform != "gpu" for device in devices):
        return None
    here = [device for device in devices if device.process_index == jax.process_index()]
    ordinals = {device.id: device.local_hardware_id for device in here}
    if not here or None in ordinals.values():
        return None
    groups = tuple(tuple(device.id for device in group) for group in device_groups)
    processes = [[device.process_index for device in group] for group in device_groups]
    if nodes is not None and any(nodes.spans(group) for group in processes):
        return _of_nodes(groups, processes, nodes, ordinals)
    number = None
    if len(here) == len(devices):
        if not all(targets.have_peer_access([ordinals[i] for i in group]) for group in groups):
            return None
    else:
        why_not = (
            world.why_not(groups) if world else "jax_ep.initialize() was not called before this program was compiled"
        )
        if (
            world
            and not why_not
            and any(len({device.process_index for device in group}) > 1 for group in device_groups)
        ):
            number = coordination.claim(compat.distributed_client(), "windows", repr(groups), world.max_groups)
            if number is None:
                why_not = f"there are more than jax_ep.config.max_groups = {world.max_groups} groupings of devices"
        if why_not:
            return _leave_to_collectives(why_not)
    targets.set_ordinals({device.id: device.local_hardware_id for device in here[0].client.local_devices()})
    for group in groups:
        if ordinals.keys() >= set(group):
            targets.make_group(list(group))
        elif world and number is not None and not ordinals.keys().isdisjoint(group):
            places = [targets.Place(*place) for place in world.places(group, number, ordinals)]
            targets.make_spanning_group(list(group), places)
    return groups


def _leave_to_collectives(why_not: str) -> Groups | None:
    """None, and a warning that says why."""
    warnings.warn(
        f"jax_ep: XLA's collectives, not the kernels, serve a group over several processes: {why_not}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _of_nodes(
    groups: Groups, processes: list[list[int]], nodes: internode.World, ordinals: dict[int, int]
) -> Groups | None:
    """The same for groups of which one lies on several nodes; `processes` are those of its ranks."""
    if nodes.collectives:
        return _leave_to_collectives(f"{internode.ACROSS_NODES} asks for it")
    if nodes.why_not:
        raise RuntimeError(f"jax_ep: a group over several nodes needs NVSHMEM. {nodes.why_not}. {internode.INSTALL}.")
    try:
        for members in processes:
            targets.nodes_of([nodes.nodes[process] for process in members])
    except RuntimeError as error:
        return _leave_to_collectives(str(error))
    number = coordination.claim(compat.distributed_client(), "rooms", repr(groups), nodes.max_groups)
    if number is None:
        return _leave_to_collectives(
            f"there are more than jax_ep.config.max_groups = {nodes.max_groups} groupings of devices"
        )
    targets.forbid_masks([device for group in groups for device in group])
    targets.set_ordinals(ordinals)
    for group, its_processes in zip(groups, processes, strict=True):
        if not ordinals.keys().isdisjoint(group):
            berths = [
                targets.Berth(process, ordinals.get(device, -1), nodes.nodes[process], nodes.room(process, number))
                for device, process in zip(group, its_processes, strict=True)
            ]
            targets.make_internode_group(list(group), berths, nodes.box_bytes)
    _over_nodes.add(groups)
    return groups


def spans_nodes(groups: Groups) -> bool:
    """Whether the kernels for several nodes serve these groups."""
    return groups in _over_nodes


@functools.cache
def device_kind() -> str:
    """What kind of GPUs serve, for the table behind mode="auto"; "unknown" where there are none (ahead of time)."""
    kinds = {device.device_kind for device in jax.devices() if device.platform == "gpu"}
    return kinds.pop() if len(kinds) == 1 else "unknown"


def make_arenas(groups: Groups, window_bytes: int) -> bool:
    """Sees to the memory of low-latency calls that need so many bytes of a window; kept for the process's life.

    False, in every process alike, where groups span processes and too little memory is shared; a warning says so.
    """
    return make_shared_arena(groups, targets.Purpose.LOW_LATENCY, targets.low_latency_arena_bytes(window_bytes))


def make_landings(groups: Groups, window_bytes: int) -> bool:
    """The same for halves of high-throughput calls, whose windows are as long as their rows.

    False, with a warning, where the memory is not there, beside what XLA has taken of the GPUs. In a program of several
    processes, which must all choose alike, that is an error if only this process can know it.
    """
    num_bytes = targets.landing_arena_bytes(window_bytes)
    try:
        return make_shared_arena(groups, targets.Purpose.HALVES, num_bytes)
    except RuntimeError as error:
        why = (
            f"{num_bytes} bytes on every GPU for what is in flight could not be had ({error}). Leave XLA less of the GPU "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION), or use jax_ep.dispatch and jax_ep.combine, which need none"
        )
        if jax.process_count() > 1:
            raise RuntimeError(f"jax_ep: the halves of a call cannot be served: {why}") from error
        warnings.warn(
            f"jax_ep: whole calls serve in the place of halves: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False


def make_shared_arena(groups: Groups, purpose: Any, num_bytes: int) -> bool:
    """Sees to `num_bytes` at each rank that all ranks of its group reach; of a purpose and size there is one in a group.

    Of groups that span processes it is a part of what `initialize` has exchanged, the same in every process, or where no more
    is left, memory that these processes make when asked (arenas.py); no process waits for another to come here. False, in
    all of them, where one has no memory, and where a group lies on several nodes.

    Raises:
      RuntimeError: a process was asked for memory and did not answer within `jax_ep.config.timeout` seconds; it is named.
    """
    if spans_nodes(groups):
        return False
    world, me = peers.world(), jax.process_index()
    processes = {device.id: device.process_index for device in jax.devices()}
    members = {group: {processes.get(device, 0) for device in group} for group in groups}
    here: dict[int, int] = {}
    if any(len(of_group) > 1 for of_group in members.values()):
        shared = _shared(groups, str(purpose), num_bytes, world) if world else None
        if shared is None:
            return False
        here = shared
    for group, of_group in members.items():
        if me in of_group:
            at = [here[device] for device in group] if len(of_group) > 1 else []
            targets.make_shared_arena(list(group), purpose, num_bytes, at)
    return True


@functools.lru_cache(maxsize=256)
def _shared(groups: Groups, purpose: str, num_bytes: int, world: peers.World) -> dict[int, int] | None:
    """Of each device, where this process sees its part of an arena, if it does; None, in every process alike, where there is none."""
    owner, room = f"{purpose} {groups!r}", -(-num_bytes // 4096) * 4096
    offset = coordination.allot(compat.distributed_client(), "arenas", owner, room, world.arena_bytes)
    here = world.arena(groups, offset) if offset is not None else arenas.make(world, groups, f"{owner} {room}", room)
    if not isinstance(here, str):
        return here
    warnings.warn(
        f"jax_ep: no memory of {room} bytes is shared between the processes of a group ({purpose}), so other ways serve its "
        f"calls of this size: jax_ep.config.arena_bytes = {world.arena_bytes} are used up, and more is not to be had: {here}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
