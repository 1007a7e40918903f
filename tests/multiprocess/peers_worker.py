"""What two processes make of each other's memory, with files in place of GPUs'; test_peers.py says what is right.

A process has two devices. Their "memory" is a memfd each for windows and arena, mapped like a GPU's.
"""

import ctypes
import mmap
import os
import signal
import threading
from pathlib import Path

import jax
from jax._src import distributed

import jax_ep
from jax_ep._src import arenas, compat, coordination, peers, targets

MOST_BYTES = 1 << 24  # of an arena that is made apart


class FileMemory:
    """Files that live in memory, of the pages of which others may map as many as they like."""

    def __init__(self, device_ids, refusal=None):
        self._device_ids, self._refusal = device_ids, refusal
        self.mapped = {}  # by address
        self.exports = 0

    def device_ids(self):
        return self._device_ids

    def have_peer_access(self):
        return True

    def export(self, num_bytes):
        self.exports += 1
        if self._refusal:
            raise RuntimeError(self._refusal)
        return [(self._new(num_bytes), self._new(1 << 16)) for _ in self._device_ids]

    def make(self, num_bytes, device_ids):
        if num_bytes > MOST_BYTES:
            raise RuntimeError("out of memory")
        self.exports += 1
        assert set(device_ids) <= set(self._device_ids)
        return [self._new(num_bytes) for _ in device_ids]

    def map(self, descriptor, num_bytes):
        pages = mmap.mmap(descriptor, num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.mapped[address] = pages
        return address

    def _new(self, num_bytes):
        descriptor = os.memfd_create("jax_ep test")
        os.ftruncate(descriptor, num_bytes)
        return peers.Region(descriptor, self.map(descriptor, num_bytes), num_bytes)


def word(address, value=None):
    """The 64-bit word at an address, written if there is a value."""
    place = ctypes.c_uint64.from_address(address)
    if value is not None:
        place.value = value
    return place.value


def start(refusal_of_process_1=None):
    me, client = jax.process_index(), compat.distributed_client()
    memory = FileMemory([100 + me, 200 + me], refusal_of_process_1 if me == 1 else None)
    return me, client, memory


def both_here(name):
    distributed.global_state.client.wait_at_barrier(f"test/{name}", 60_000)


def shares():
    """Windows and arenas of the other process are read and written by their addresses here."""
    jax_ep.config.arena_bytes = 1 << 20
    me, client, memory = start()
    if me == 0:  # comes too early, then again
        jax_ep.config.timeout = 1.0
        try:
            peers.exchange(client, me, 2, memory)
        except RuntimeError as error:
            early = str(error)
        jax_ep.config.timeout = 60.0
    both_here("early")
    world = peers.exchange(client, me, 2, memory)
    other, ordinals = 1 - me, {100 + me: 0, 200 + me: 1}
    group = (100, 201, 101, 200)
    places = world.places(group, 3, ordinals)
    # Every rank leaves a word in every other's window, at its own place there.
    for rank, (_, _, window, *_) in enumerate(places):
        for source in (i for i, place in enumerate(places) if place[1] >= 0):
            word(window + 8 * source, 1000 * source + rank)
            word(world.arena([group], 8192)[group[rank]] + 8 * source, -(1000 * source + rank) % 2**64)
    # An address in XLA's memory of a device as its owner sees it, for the other to translate.
    own = next(i for i, place in enumerate(places) if place[1] == 0)
    begin, num_bytes, shift = places[own][3:]
    posted = begin + num_bytes - 64
    word(posted, 7000 + me)
    theirs = coordination.gather(client, "posted", [own, posted], me, 2)
    rank, address = theirs[other]
    read = word((address + places[rank][5]) % 2**64)
    both_here("written")
    windows = [[word(window + 8 * i) for i in range(4)] for _, device, window, *_ in places if device >= 0]
    own_arenas = [world.arena([group], 8192)[group[rank]] for rank, place in enumerate(places) if place[1] >= 0]
    arenas = [[-word(at + 8 * i) % 2**64 for i in range(4)] for at in own_arenas]
    neighbours = [word(window + peers.window_stride()) for _, device, window, *_ in places if device >= 0]
    return {
        "early": early if me == 0 else None,
        "exports": memory.exports,
        "again": peers.exchange(client, me, 2, memory) is world,
        "why_not": [world.why_not(groups) for groups in ([group], [(100, 200), (101, 201)], [(100, 999)])],
        "places": [place[:2] for place in places],
        "own_shift": shift,
        "windows": windows,
        "arenas": arenas,
        "neighbours": neighbours,
        "read": read,
        "left_open": open_files() - len(memory.mapped),  # mmap keeps one each
    }


def open_files():
    """How many descriptors of FileMemory this process has."""
    links = (path for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return sum("jax_ep test" in str(path.readlink()) for path in links)


class Anew:
    """The coordination service as a job of its own would find it: nothing has been said there yet."""

    def __init__(self, client, job):
        self._client, self._job = client, job

    def __getattr__(self, name):
        return lambda key, *args, **options: getattr(self._client, name)(f"{self._job}/{key}", *args, **options)


def left_over():
    """What this process holds and could leave behind."""
    descriptors = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    offers = [line for line in Path("/proc/net/unix").read_text().splitlines() if "@jax_ep" in line]
    return {
        "descriptors": sorted(descriptors),
        "offers": [line for line in offers if f"socket:[{line.split()[6]}]" in descriptors],
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def starts_often(count):
    """So many exchanges one after the other, as of so many jobs; what is there after the first and after the last."""
    jax_ep.config.arena_bytes = 1 << 20
    client, seen = compat.distributed_client(), []
    for job in range(count):
        peers._world = None
        me, _, memory = start()
        world = peers.exchange(Anew(client, job), me, 2, memory)
        assert world.why_not([(100, 101)]) is None
        assert set(arenas.make(world, [(100, 101)], "key", 5000)) == {100, 101}
        both_here(f"mapped {job}")
        peers.forget()
        world.maker.close()
        memory.mapped.clear()  # unmapped, as at a process's end
        both_here(f"forgotten {job}")
        for thread in threading.enumerate():
            if thread.name == "jax_ep descriptors":
                thread.join(10)
        both_here(f"over {job}")
        if job in (0, count - 1):
            seen.append(left_over())
        both_here(f"seen {job}")
    return seen


def is_killed(offers):
    """Process 1 is killed in the middle of the exchange: before others can fetch its memory, or after; what process 0 is told."""
    me, client, memory = start()
    jax_ep.config.timeout = 3.0
    export = memory.export

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def export_then_kill(num_bytes):
        regions = export(num_bytes)
        memory.map = kill
        return regions

    if me == 1:
        memory.export = export_then_kill if offers else kill
    try:
        peers.exchange(client, me, 2, memory)
    except RuntimeError as error:
        return str(error)
    return None


def makes_more():
    """Arenas that processes make when asked: who asks first, again, for too much, and when one of them is gone."""
    me, client, memory = start()
    world = peers.exchange(client, me, 2, memory)
    group, seen = (100, 201, 101, 200), {}
    if me == 0:  # before process 1 has come here at all
        before = arenas.make(world, [group], "a", 5000)
    both_here("asked by 0")
    here = arenas.make(world, [group], "a", 5000)
    for i, device in enumerate(group):
        word(here[device] + 8 * me, 10 * i + me)
    both_here("written")
    seen["words"] = [[word(here[device] + 8 * source) for source in range(2)] for device in group]
    seen["again"] = me == 1 or seen["words"] == [[word(before[d] + 8 * source) for source in range(2)] for d in group]
    # Different ones, in different orders at the same time; one in which only some devices take part.
    keys = [("b", [group]), ("c", [(101, 100)]), ("d", [(200, 201), (101, 100)])]
    for key, groups in keys if me == 0 else keys[::-1]:
        seen[key] = sorted(arenas.make(world, groups, key, 100))
    seen["made"] = memory.exports
    seen["too much"] = arenas.make(world, [group], "e", MOST_BYTES + 1)
    both_here("all asked")
    if me == 1:
        world.maker.close()
    both_here("1 answers no more")
    jax_ep.config.timeout = 2.0
    if me == 0:
        try:
            arenas.make(world, [group], "f", 100)
        except RuntimeError as error:
            seen["gone"] = str(error)
    return seen


def refuses():
    """One process cannot share: both say so, of groups over both, and of no others."""
    me, client, memory = start(refusal_of_process_1="its memory grows")
    world = peers.exchange(client, me, 2, memory)
    return [world.why_not(groups) for groups in ([(100, 101)], [(100, 200), (101, 201)])]


def claims():
    """Two processes that meet the same groups in different orders give them the same numbers."""
    me, client = jax.process_index(), compat.distributed_client()
    owners = ["a", "b", "c", "d"]
    first = {owner: coordination.claim(client, "test", owner, 3) for owner in (owners if me == 0 else owners[::-1])}
    return first, {owner: coordination.claim(client, "test", owner, 3) for owner in owners}


def allots():
    """Two processes that ask for room in different orders are told the same, and none is told of room that is not there."""
    me, client = jax.process_index(), compat.distributed_client()
    asks = [("a", 300), ("b", 500), ("c", 150), ("d", 400), ("e", 50), ("f", 100)]
    first = {owner: coordination.allot(client, "room", owner, amount, 1000) for owner, amount in asks[:: 1 - 2 * me]}
    both_here("asked for room")
    return first, {owner: coordination.allot(client, "room", owner, amount, 1000) for owner, amount in asks}, dict(asks)


def resumes():
    """A failure that one process has heard of: it asks, the other joins, and their generation is beyond both's."""
    me = jax.process_index()
    jax_ep.initialize()
    seen = {"quiet": targets.spanning_generation()}
    both_here("quiet")
    if me == 0:
        targets.resume(41)  # as if it had failed more often
        targets.has_failed_spanning = lambda: True
        jax_ep.config.timeout = 1.0
        try:
            jax_ep.initialize()
        except RuntimeError as error:
            seen["alone"] = str(error)
        jax_ep.config.timeout = 60.0
    both_here("asked")
    jax_ep.initialize()
    seen["together"] = targets.spanning_generation()
    targets.has_failed_spanning = lambda: False
    both_here("resumed")
    jax_ep.initialize()
    seen["again"] = targets.spanning_generation()
    return seen
