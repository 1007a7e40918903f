"""The memory of other processes on this host: what each exports, where it is mapped here, which groups kernels can serve.

All of it is exchanged once, by `initialize`: on every device windows for `config.max_groups` groups and `config.arena_bytes`
for arenas, and XLA's memory there, into which kernels of peers write. So making a group or an arena while a program is lowered
waits for no other process; they only agree, through set-once keys, on who gets which part. What cannot be shared is known to
all of them, so they decide alike.
Neighbours: coordination.py, descriptors.py, arenas.py, ffi/group/shared_memory.h; group.py asks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jax_ep._src import arenas, coordination, descriptors, targets
from jax_ep._src.config import config

Group = tuple[int, ...]  # of device ids, rank by rank

PREALLOCATE = (
    "leave XLA_PYTHON_CLIENT_PREALLOCATE and XLA_PYTHON_CLIENT_ALLOCATOR unset, so that all of it is one allocation"
)


@dataclasses.dataclass(frozen=True)
class Region:
    """Memory of one device: a descriptor for others, and where its own process sees it."""

    descriptor: int
    begin: int
    num_bytes: int


class Memory(Protocol):
    """The devices of this process whose memory is shared: CUDA's, or the tests' of files."""

    def device_ids(self) -> list[int]:
        """JAX's ids of the devices."""

    def have_peer_access(self) -> bool:
        """Whether all of them read and write each other's memory."""

    def export(self, num_bytes: int) -> list[tuple[Region, Region]]:
        """Of each device, zeros for windows and arenas, and the memory of its arrays; RuntimeError with the reason if it cannot be."""

    def make(self, num_bytes: int, device_ids: Sequence[int]) -> list[Region]:
        """New zeros on each of these devices; RuntimeError with the reason if there is no room."""

    def map(self, descriptor: int, num_bytes: int) -> int:
        """Makes another process's memory accessible to all devices of this one; returns its address here."""


class CudaMemory:
    """Memory of this process's GPUs."""

    def __init__(self) -> None:
        self._devices = [device for device in jax.local_devices() if device.platform == "gpu"]
        self._ordinals = [device.local_hardware_id for device in self._devices]

    def device_ids(self) -> list[int]:
        return [device.id for device in self._devices]

    def have_peer_access(self) -> bool:
        return bool(targets.have_peer_access(self._ordinals))

    def export(self, num_bytes: int) -> list[tuple[Region, Region]]:
        regions: list[tuple[Region, Region]] = []
        try:
            for device in self._devices:
                xla = self.xla_memory(device)
                (shared,) = self.make(num_bytes, [device.id])
                regions.append((shared, xla))
        except Exception:
            for pair in regions:
                for region in pair:
                    os.close(region.descriptor)
            raise
        return regions

    def make(self, num_bytes: int, device_ids: Sequence[int]) -> list[Region]:
        ordinals = dict(zip(self.device_ids(), self._ordinals, strict=True))
        regions: list[Region] = []
        try:
            for device_id in device_ids:
                shared = targets.make_shared_memory(ordinals[device_id], num_bytes, self._ordinals)
                regions.append(Region(shared.fd, shared.begin, shared.bytes))
        except Exception:
            for region in regions:
                os.close(region.descriptor)
            raise
        return regions

    def xla_memory(self, device: Any) -> Region:
        """The memory in which XLA places the arrays of `device`; RuntimeError if that is not one allocation of known extent."""
        probe = jax.device_put(np.zeros(1, np.float32), device)
        try:
            shared = targets.export_allocation(device.local_hardware_id, probe.unsafe_buffer_pointer())
        except RuntimeError as error:
            raise RuntimeError(f"XLA's memory on {device} cannot be shared ({error}): {PREALLOCATE}") from error
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None or shared.bytes < 0.9 * limit:
            os.close(shared.fd)
            raise RuntimeError(
                f"XLA's memory on {device} grows ({shared.bytes} bytes here, {limit} in all) and cannot be shared: {PREALLOCATE}"
            )
        return Region(shared.fd, shared.begin, shared.bytes)

    def map(self, descriptor: int, num_bytes: int) -> int:
        return int(targets.import_memory(descriptor, num_bytes, self._ordinals))


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a device's memory is: begin and bytes as its own process sees it, `*_here` as this one does, if it does."""

    process: int
    shared: tuple[int, int]  # windows, then arenas
    xla: tuple[int, int]
    shared_here: int | None
    xla_here: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What all processes know of each other; `reasons` and `hosts` are the same in each of them."""

    me: int
    hosts: list[str]
    # Why kernels serve no group of process (p,), none that p shares with others (p, p), none that p shares with q (p, q).
    reasons: dict[tuple[int, ...], str]
    devices: dict[int, Device]
    max_groups: int  # for so many groupings there are windows
    arena_bytes: int  # for arenas, behind the windows
    makers: list[str | None]  # where each process answers who asks for larger ones
    maker: arenas.Maker | None  # this one's

    def why_not(self, groups: Sequence[Group]) -> str | None:
        """Why kernels cannot serve these groups; None if they can. The same in every process."""
        for group in groups:
            if unknown := [device for device in group if device not in self.devices]:
                return f"device {unknown[0]} was not there when jax_ep.initialize() was called"
            processes = sorted({self.devices[device].process for device in group})
            if len({self.hosts[process] for process in processes}) > 1:
                return f"the kernels serve devices of one host, and processes {processes} are on several"
            pairs = [(a, b) for a in processes for b in processes] if len(processes) > 1 else []
            for key in [*((process,) for process in processes), *pairs]:
                if key in self.reasons:
                    return f"process {' with process '.join(map(str, dict.fromkeys(key)))}: {self.reasons[key]}"
        return None

    def places(self, group: Group, number: int, ordinals: dict[int, int]) -> list[tuple[int, ...]]:
        """Of each rank, the fields of ffi/group/group.h's Place; `number` says which windows are this group's.

        `ordinals` has the CUDA ordinals of this process's devices.
        """
        places: list[tuple[int, ...]] = []
        for device_id in group:
            device = self.devices[device_id]
            assert device.shared_here is not None and device.xla_here is not None
            window = device.shared_here + number * window_stride()
            shift = (device.xla_here - device.xla[0]) % 2**64
            places.append((device.process, ordinals.get(device_id, -1), window, *device.xla, shift))
        return places

    def arena(self, groups: Sequence[Group], offset: int) -> dict[int, int]:
        """Of each device, where this process sees, if it does, the arena that begins at `offset` among the arenas."""
        here = {device: self.devices[device].shared_here for group in groups for device in group}
        behind = self.max_groups * window_stride() + offset
        return {device: begin + behind for device, begin in here.items() if begin is not None}


_exported: dict[str, Any] = {}  # by an exchange that may have to be tried again: what is exported, and the offer of it
_world: World | None = None


def window_stride() -> int:
    """Bytes from one group's window to the next."""
    return -(-targets.window_bytes // 4096) * 4096


def shared_bytes() -> int:
    """Bytes of a device's windows and arenas."""
    return config.max_groups * window_stride() + config.arena_bytes


def world() -> World | None:
    """What `exchange` found; None before it."""
    return _world


def exchange(client: Any, me: int, num_processes: int, memory: Memory) -> World:
    """Exports this process's memory, maps that of the processes on its host, and agrees with all on what can be served.

    Every process calls it; later calls return what the first found.

    Raises:
      RuntimeError: processes did not come within `jax_ep.config.timeout` seconds; they are named.
    """
    global _world
    if _world is not None:
        return _world
    hosts = coordination.gather(client, "hosts", descriptors.host(), me, num_processes)
    tables = coordination.gather(client, "memory", _export(memory, hosts.count(hosts[me]) > 1), me, num_processes)
    mapped: dict[int, list[int]] = {}
    failures: dict[str, str] = {}
    for process, table in enumerate(tables):
        if process != me and hosts[process] == hosts[me] and table["offer"] and tables[me]["offer"]:
            try:
                mapped[process] = _map(memory, table)
            except (OSError, RuntimeError) as error:
                failures[str(process)] = f"its memory cannot be mapped: {error}"
    verdicts = coordination.gather(client, "mapped", failures, me, num_processes)  # by then, all have fetched
    maker = _exported.pop("maker", None)
    forget()
    reasons: dict[tuple[int, ...], str] = {}
    for process, table in enumerate(tables):
        reasons |= {(process,) * int(processes): reason for processes, reason in table["reasons"].items()}
    for process, verdict in enumerate(verdicts):
        reasons |= {(process, int(other)): reason for other, reason in verdict.items()}
    devices = {}
    for process, table in enumerate(tables):
        here = mapped.get(process)
        for i, (device_id, shared, xla) in enumerate(table["devices"]):
            addresses = (
                (shared[0], xla[0]) if process == me else (here[2 * i], here[2 * i + 1]) if here else (None, None)
            )
            devices[device_id] = Device(process, tuple(shared), tuple(xla), *addresses)
    _world = World(
        me, hosts, reasons, devices, config.max_groups, config.arena_bytes, [table["maker"] for table in tables], maker
    )
    return _world


def forget() -> None:
    """Ends the offer of an exchange; mapped memory stays, since peers may still write to it."""
    for name in ("offer", "maker"):
        if server := _exported.pop(name, None):
            server.close()
    _exported.clear()


def _export(memory: Memory, has_neighbours: bool) -> dict[str, Any]:
    """This process's row of what all are told; made once, however often the exchange is tried."""
    if "table" in _exported:
        return _exported["table"]
    nothing = (0, 0)
    devices = [(device_id, nothing, nothing) for device_id in memory.device_ids()]
    table: dict[str, Any] = {
        "offer": None,
        "maker": None,
        "devices": devices,
        "reasons": {},
    }  # by 1 or 2, as the keys of World.reasons
    if not devices:
        table["reasons"][1] = "it has no GPU"
    elif not memory.have_peer_access():
        table["reasons"][1] = "its GPUs do not reach each other's memory"
    elif has_neighbours:
        try:
            regions = memory.export(shared_bytes())
        except RuntimeError as error:
            table["reasons"][2] = str(error)
        else:
            _exported["offer"] = descriptors.Offer([region.descriptor for pair in regions for region in pair])
            _exported["maker"] = arenas.Maker(memory)
            table |= {name: _exported[name].name for name in ("offer", "maker")}
            table["devices"] = [
                (device_id, (shared.begin, shared.num_bytes), (xla.begin, xla.num_bytes))
                for (device_id, _, _), (shared, xla) in zip(devices, regions, strict=True)
            ]
    _exported["table"] = table
    return table


def _map(memory: Memory, table: dict[str, Any]) -> list[int]:
    """Where both memories of each device of another process are here."""
    sizes = [num_bytes for _, shared, xla in table["devices"] for _, num_bytes in (shared, xla)]
    received = descriptors.fetch(table["offer"], len(sizes), config.timeout)
    try:
        return [memory.map(descriptor, num_bytes) for descriptor, num_bytes in zip(received, sizes, strict=True)]
    finally:
        for descriptor in received:
            os.close(descriptor)
