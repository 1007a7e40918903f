"""Groups over several nodes: NVSHMEM, the memory that its processes share, and which process lies on which node.

`initialize` calls `exchange`: where processes lie on several nodes, all of them load NVSHMEM and the kernels that link it
(jax_ep._internode), and allocate rooms for `config.max_groups` groups, at the same place in each. So making a group while a
program is lowered needs no other process. On one node nothing of this is imported. A node is a host; the variable
JAX_EP_RANKS_PER_NODE splits a host's processes into pretended ones, for tests. Where NVLink
goes from node to node (all of a pretended host, and racks of it) the kernels store into all rooms. Neighbours: peers.py is the same
inside a host, group.py asks, ffi/internode/ has the kernels and room.h the memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from jax_ep._src import coordination, descriptors, targets
from jax_ep._src.config import config

RANKS_PER_NODE = "JAX_EP_RANKS_PER_NODE"
ACROSS_NODES = "JAX_EP_ACROSS_NODES"
COLLECTIVES = "collectives"  # XLA's serve
PUTS = "puts"  # rows are put over the network, wherever they go
OLDEST, TOO_NEW = (3, 4, 5), (3, 7, 0)  # 3.7 grew the state that kernels share with the host library
INSTALL = (
    "Install it in every process with pip install 'jax_ep[nvshmem]' (nvshmem4py-cu13 and nvidia-nvshmem-cu13>=3.4.5,<3.7), or "
    f"set {ACROSS_NODES}=collectives to have XLA's collectives serve groups over nodes"
)


class Transport(Protocol):
    """NVSHMEM in this process, or the tests' pretence of it."""

    def why_not(self) -> str | None:
        """Why it cannot be used here; None if it can. Imports what is needed."""

    def unique_id(self) -> bytes:
        """What the processes' initialisations have in common; one process makes it."""

    def initialize(self, unique_id: bytes, me: int, num_processes: int) -> None:
        """Collective; does nothing the second time. RuntimeError with the reason."""

    def allocate(self, num_bytes: int) -> int:
        """Collective: zeros at the same place in every process; their address here."""

    def mapped(self, address: int, process: int) -> int:
        """Where that place in another process's memory is mapped here; 0 where it is not."""


class Nvshmem:
    """NVSHMEM through nvshmem4py, with this process's one GPU."""

    def __init__(self) -> None:
        self._kernels: Any = None
        self._bindings: Any = None
        self._device = -1

    def why_not(self) -> str | None:
        gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
        if len(gpus) != 1:
            return f"it has {len(gpus)} GPUs, and NVSHMEM wants one process a GPU"
        self._device = gpus[0].local_hardware_id
        return self.load()

    def load(self) -> str | None:
        """Imports the kernels and the bindings; what is missing, or None."""
        if importlib.util.find_spec("jax_ep._internode") is None:
            return "jax_ep was built without NVSHMEM: build it where nvidia-nvshmem-cu13 is installed"
        if importlib.util.find_spec("nvshmem") is None:
            return "NVSHMEM's Python bindings (nvshmem4py) are not installed"
        os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")  # NVLink multicast is of no use here
        try:
            load_host_library()
            self._kernels = importlib.import_module("jax_ep._internode")
            self._bindings = importlib.import_module("nvshmem.bindings")
        except (ImportError, OSError, RuntimeError) as error:
            return f"NVSHMEM cannot be loaded ({error})"
        loaded = self._kernels.loaded_nvshmem()
        if not OLDEST <= loaded < TOO_NEW:
            return f"NVSHMEM must be >=3.4.5,<3.7, got {'.'.join(map(str, loaded))}"
        return None

    def unique_id(self) -> bytes:
        made = self._bindings.uniqueid()
        self._bindings.get_uniqueid(made.ptr)
        return bytes(made._data.tobytes())

    def initialize(self, unique_id: bytes, me: int, num_processes: int) -> None:
        self._kernels.use_device(self._device)
        if self._kernels.status() < 2:
            same = self._bindings.uniqueid()
            ctypes.memmove(same.ptr, unique_id, len(unique_id))
            attributes = self._bindings.InitAttr()
            self._bindings.set_attr_uniqueid_args(me, num_processes, same.ptr, attributes.ptr)
            self._bindings.hostlib_init_attr(self._bindings.Flags.INIT_WITH_UNIQUEID, attributes.ptr)
        if self._kernels.status() < 2:  # hostlib_init_attr may return 0 all the same
            raise RuntimeError(
                f"NVSHMEM's initialisation ended in status {self._kernels.status()}; NVSHMEM_DEBUG=INFO shows why"
            )
        if self._bindings.my_pe() != me:
            raise RuntimeError(
                f"NVSHMEM was initialised by somebody else, as number {self._bindings.my_pe()}, not {me}"
            )
        if why_not := self._kernels.attach(self._device):
            raise RuntimeError(f"the kernels found no NVSHMEM: {why_not}")
        targets.install_internode(self._kernels.kernels())

    def allocate(self, num_bytes: int) -> int:
        self._kernels.use_device(self._device)
        address = int(self._bindings.malloc(num_bytes))
        if address == 0 or not self._kernels.clear(address, num_bytes):
            raise RuntimeError(f"NVSHMEM has no {num_bytes} bytes of symmetric memory; raise NVSHMEM_SYMMETRIC_SIZE")
        return address

    def mapped(self, address: int, process: int) -> int:
        return int(self._bindings.ptr(address, process))


def host_library() -> Path | None:
    """libnvshmem_host.so.3 of the package nvidia-nvshmem-cu13; None where that is not installed."""
    spec = importlib.util.find_spec("nvidia")
    places = (
        Path(place) / "nvshmem/lib/libnvshmem_host.so.3"
        for place in (spec.submodule_search_locations or () if spec else ())
    )
    return next((place for place in places if place.is_file()), None)


def load_host_library() -> None:
    """Loads it, or the system's, for all to see: jax_ep._internode and nvshmem4py ask for it by name, XLA may have it."""
    ctypes.CDLL(str(host_library() or "libnvshmem_host.so.3"), mode=ctypes.RTLD_GLOBAL)


# ---- nodes -----------------------------------------------------------------------------------------------------------


def ranks_per_node() -> int | None:
    """How many ranks a pretended node has, by the environment; None where nodes are hosts.

    Raises:
      RuntimeError: it is not a positive number.
    """
    told = os.environ.get(RANKS_PER_NODE)
    if told is None:
        return None
    if not told.isdigit() or int(told) < 1:
        raise RuntimeError(
            f"initialize: {RANKS_PER_NODE} must be a positive number, got {told!r}. Unset it outside of tests."
        )
    return int(told)


def split(hosts: Sequence[str], ranks_per_node: int | None) -> list[int]:
    """The node of each process: hosts numbered as they come, each split into parts of `ranks_per_node` processes.

    Example:
      >>> split(["a", "b", "a", "a"], None), split(["a", "b", "a", "a"], 2)
      ([0, 1, 0, 0], [0, 1, 0, 2])
    """
    numbers: dict[tuple[str, int], int] = {}
    before: dict[str, int] = {}
    nodes = []
    for host in hosts:
        place = before.get(host, 0)
        before[host] = place + 1
        part = (host, place // ranks_per_node if ranks_per_node else 0)
        nodes.append(numbers.setdefault(part, len(numbers)))
    return nodes


def asked_for() -> str | None:
    """How groups over nodes are to be served, by the environment; None where that is left to jax_ep.

    Raises:
      RuntimeError: it is neither "collectives" nor "puts".
    """
    told = os.environ.get(ACROSS_NODES)
    if told not in (None, COLLECTIVES, PUTS):
        raise RuntimeError(
            f"initialize: {ACROSS_NODES} must be {COLLECTIVES!r} or {PUTS!r}, got {told!r}. Unset it to have jax_ep choose."
        )
    return told


# ---- what the processes share ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Who lies where; `nodes`, `why_not` and `collectives` are the same in every process."""

    nodes: list[int]  # of each process
    collectives: bool  # somebody has asked that XLA's serve
    why_not: str | None  # why the kernels cannot
    rooms: dict[int, int]  # by process, where its rooms are mapped here: this node's, and all others' or none
    box_bytes: int
    room_bytes: int
    max_groups: int

    def spans(self, processes: Sequence[int]) -> bool:
        """Whether these lie on several nodes."""
        return len({self.nodes[process] for process in processes}) > 1

    def room(self, process: int, number: int) -> int:
        """Where room `number` of a process is mapped here; 0 where it is not."""
        return self.rooms[process] + number * self.room_bytes if process in self.rooms else 0


_world: World | None = None
_transport: Transport | None = None


def world() -> World | None:
    """What `exchange` found; None before it, and where all processes lie on one node."""
    return _world


def exchange(
    client: Any, me: int, num_processes: int, make_transport: Callable[[], Transport] = Nvshmem
) -> World | None:
    """Agrees with all processes on the nodes, and where there are several sets NVSHMEM up.

    Every process calls it; later calls return what the first found.

    Raises:
      RuntimeError: processes did not come within `jax_ep.config.timeout` seconds (they are named), or were told different
        nodes, or one what there is not. That NVSHMEM is missing is no error yet: the first program that needs it says so.
    """
    global _world, _transport
    if _world is not None:
        return _world
    mine = [descriptors.host(), ranks_per_node(), asked_for()]
    told = coordination.gather(client, "nodes", mine, me, num_processes)
    if len({pretended for _, pretended, _ in told}) > 1:
        raise RuntimeError(
            f"initialize: {RANKS_PER_NODE} must be the same in every process, got {[pretended for _, pretended, _ in told]}."
        )
    nodes = split([host for host, _, _ in told], told[me][1])
    if len(set(nodes)) == 1:
        return None
    if len({host for host, _, _ in told}) == 1:
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
    asked = {asked for _, _, asked in told}
    collectives = COLLECTIVES in asked
    box, room = targets.box_bytes(num_processes), targets.room_bytes(num_processes)
    rooms: dict[int, int] = {}
    why_not = None
    if not collectives:
        _transport = _transport or make_transport()
        why_not = _first_reason(coordination.gather(client, "nvshmem", _transport.why_not(), me, num_processes))
        if why_not is None:
            identity = _transport.unique_id().hex() if me == 0 else None
            identity = coordination.gather(client, "nvshmem id", identity, me, num_processes)[0]
            failure = None
            try:
                rooms = _within_deadline(
                    "NVSHMEM's initialisation",
                    lambda: _set_up(_transport, bytes.fromhex(identity), me, nodes, config.max_groups * room),
                )
            except Exception as error:  # told to all, who would wait
                failure = str(error)
            ready = coordination.gather(client, "nvshmem ready", [failure, len(rooms)], me, num_processes)
            why_not = _first_reason([failure for failure, _ in ready])
            # Ranks send through each other, so all must know alike whether stores reach the other nodes.
            if PUTS in asked or any(mapped < num_processes for _, mapped in ready):
                rooms = {process: address for process, address in rooms.items() if nodes[process] == nodes[me]}
    _world = World(nodes, collectives, why_not, rooms, box, room, config.max_groups)
    return _world


def _first_reason(reasons: Sequence[str | None]) -> str | None:
    return next((f"process {process}: {reason}" for process, reason in enumerate(reasons) if reason), None)


def _set_up(transport: Transport, identity: bytes, me: int, nodes: list[int], num_bytes: int) -> dict[int, int]:
    """Where the rooms of each process are mapped here, if they are: those on this one's node must be."""
    transport.initialize(identity, me, len(nodes))
    address = transport.allocate(num_bytes)
    rooms = {}
    for process, node in enumerate(nodes):
        mapped = address if process == me else transport.mapped(address, process)
        if mapped != 0:
            rooms[process] = mapped
        elif node == nodes[me]:
            raise RuntimeError(
                f"process {process} is on the same node, and its memory is not mapped: no peer access, or "
                "CUDA_VISIBLE_DEVICES hides its GPU"
            )
    return rooms


def _within_deadline(what: str, call: Callable[[], Any]) -> Any:
    """The call's result; RuntimeError if it takes longer than `config.timeout`, and is left behind."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(config.timeout)
    if errors:
        raise errors[0]
    if not result:
        raise RuntimeError(f"{what} did not end within {config.timeout:g} s: do all processes reach each other?")
    return result[0]


# ---- for the doctor --------------------------------------------------------------------------------------------------


def describe() -> str:
    """What this process has for groups over nodes, in a phrase; nothing is loaded for it."""
    missing = [
        what
        for module, what in (
            ("jax_ep._internode", "the kernels (jax_ep was built without NVSHMEM)"),
            ("nvshmem", "nvshmem4py"),
        )
        if importlib.util.find_spec(module) is None
    ]
    installed = f"without {' and '.join(missing)}" if missing else "NVSHMEM installed"
    if _world is None:
        return f"{installed}; all processes lie on one node"
    num_nodes = len(set(_world.nodes))
    if _world.collectives:
        return f"{num_nodes} nodes, served by XLA's collectives: {ACROSS_NODES} asks for it"
    if _world.why_not:
        return f"{num_nodes} nodes, not served: {_world.why_not}"
    by = "NVLink in NVSHMEM's memory" if len(_world.rooms) == len(_world.nodes) else "NVSHMEM"
    return f"{num_nodes} nodes, served by {by}; {_world.max_groups * _world.room_bytes / 2**20:.0f} MiB a process"
