"""Which groups kernels serve, and what is made for them: with GPUs that are only named, in a job that is only told of."""

import dataclasses
import types
import warnings

import jax
import numpy as np
import pytest

import jax_ep
from jax_ep._src import arenas, compat, coordination, group, internode, peers, targets


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Number `id` of the job, number `local_hardware_id` of its process."""

    id: int
    process_index: int
    local_hardware_id: int | None
    platform: str = "gpu"

    @property
    def client(self):
        return types.SimpleNamespace(local_devices=lambda: [gpu for gpu in GPUS if gpu.process_index == 0])


# Processes 0 and 1 on one host, 2 on another; this is process 0. What is not of this process has no number here.
GPUS = [Gpu(10 + i, i // 2, i % 2 if i < 2 else None) for i in range(6)]
HOSTS = ["here", "here", "elsewhere"]


def world(reasons=None, max_groups=8, arena_bytes=1 << 20):
    devices = {
        gpu.id: peers.Device(
            process=gpu.process_index,
            shared=(1000 * gpu.id, 100),
            xla=(100_000 * gpu.id, 5000),
            shared_here=(1000 if gpu.process_index == 0 else 7000) * gpu.id,
            xla_here=(100_000 if gpu.process_index == 0 else 90_000) * gpu.id,
        )
        for gpu in GPUS
    }
    return peers.World(0, HOSTS, reasons or {}, devices, max_groups, arena_bytes, ["a", "b", "c"], None)


class Made:
    """What ffi/group/ is asked for."""

    def __init__(self):
        self.local, self.spanning, self.over_nodes, self.ordinals, self.arenas = [], {}, {}, {}, []
        self.unmaskable = []


@pytest.fixture
def made(monkeypatch):
    made, numbers = Made(), {}
    monkeypatch.setattr(targets, "have_peer_access", lambda ordinals: True)
    monkeypatch.setattr(targets, "set_timeout", lambda seconds: None)
    monkeypatch.setattr(targets, "set_ordinals", made.ordinals.update)
    monkeypatch.setattr(targets, "make_group", made.local.append)
    monkeypatch.setattr(targets, "make_spanning_group", lambda ids, places: made.spanning.update({tuple(ids): places}))
    monkeypatch.setattr(targets, "Place", lambda *fields: fields)
    monkeypatch.setattr(targets, "Berth", lambda *fields: fields)
    monkeypatch.setattr(
        targets, "make_internode_group", lambda ids, berths, box_bytes: made.over_nodes.update({tuple(ids): berths})
    )
    monkeypatch.setattr(targets, "forbid_masks", made.unmaskable.extend)
    monkeypatch.setattr(group, "_over_nodes", set())
    monkeypatch.setattr(targets, "make_shared_arena", lambda *arena: made.arenas.append(arena))
    monkeypatch.setattr(compat, "distributed_client", lambda: None)

    def claim(client, topic, owner, count):
        assert topic in ("windows", "rooms")
        number = numbers.setdefault((topic, owner), len(numbers))
        return number if number < count else None

    def allot(client, topic, owner, amount, total):
        assert topic == "arenas" and amount % 4096 == 0
        begin = allotted.setdefault((owner, amount), sum(amount for _, amount in allotted))
        return begin if begin + amount <= total else None

    allotted = {}
    monkeypatch.setattr(coordination, "claim", claim)
    monkeypatch.setattr(coordination, "allot", allot)
    monkeypatch.setattr(jax, "devices", lambda: GPUS)
    for cache in (group._of_devices, group._shared):
        cache.cache_clear()
    yield made
    for cache in (group._of_devices, group._shared):
        cache.cache_clear()


def along(monkeypatch, known, ids, shape=(-1,), names=("expert",), nodes=None):
    """group.along of a mesh of these GPUs, and the warning, if any; the last axis is the experts'."""
    monkeypatch.setattr(peers, "world", lambda: known)
    monkeypatch.setattr(internode, "world", lambda: nodes)
    by_id = {gpu.id: gpu for gpu in GPUS}
    mesh = types.SimpleNamespace(
        devices=np.array([by_id[i] for i in ids]).reshape(shape), axis_names=names, empty=False
    )
    monkeypatch.setattr(jax.sharding, "Mesh", types.SimpleNamespace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = group.along(types.SimpleNamespace(mesh=mesh), names[-1:])
    return groups, [str(warning.message) for warning in caught]


def test_a_group_over_two_processes_takes_its_windows_from_what_was_exchanged(monkeypatch, made):
    groups, warned = along(monkeypatch, world(), [11, 12, 10, 13])
    assert groups == ((11, 12, 10, 13),) and not warned
    assert made.ordinals == {10: 0, 11: 1} and not made.local
    (places,) = made.spanning.values()
    assert [place[:2] for place in places] == [(0, 1), (1, -1), (0, 0), (1, -1)]
    assert [place[2] for place in places] == [11_000, 84_000, 10_000, 91_000]
    assert [place[3:5] for place in places] == [
        (1_100_000, 5000),
        (1_200_000, 5000),
        (1_000_000, 5000),
        (1_300_000, 5000),
    ]
    # 90 000 * 12 here is 100 000 * 12 there: what is added is negative, modulo 2^64.
    assert [place[5] for place in places] == [0, 2**64 - 120_000, 0, 2**64 - 130_000]

    along(monkeypatch, world(), [10, 12])
    assert [place[2] for place in made.spanning[10, 12]] == [
        own + peers.window_stride() for own in (10_000, 84_000)
    ]  # the next windows


def test_of_groups_within_processes_each_process_makes_its_own(monkeypatch, made):
    groups, warned = along(monkeypatch, world(), [10, 11, 12, 13, 14, 15], (3, 2), ("data", "expert"))
    assert groups == ((10, 11), (12, 13), (14, 15)) and not warned
    assert made.local == [[10, 11]] and not made.spanning


def test_groups_over_processes_of_several_hosts_are_made_where_their_devices_are(monkeypatch, made):
    known = world()
    groups, _ = along(monkeypatch, known, [10, 12, 11, 13], (2, 2), ("data", "expert"))
    assert groups == ((10, 12), (11, 13)) and set(made.spanning) == {(10, 12), (11, 13)}
    # Both groups of the mesh use the same number: they are disjoint.
    assert [places[0][2] for places in made.spanning.values()] == [10_000, 11_000]


@pytest.mark.parametrize(
    ("known", "ids", "why"),
    [
        (None, [10, 12], r"jax_ep\.initialize\(\) was not called before this program was compiled"),
        (world(), [10, 14], r"devices of one host, and processes \[0, 2\] are on several"),
        (world({(1, 1): "its memory grows"}), [10, 12], "process 1: its memory grows"),
        (world({(1, 0): "no peer access"}), [10, 12], "process 1 with process 0: no peer access"),
        (world({(1,): "it has no NVLink"}), [10, 12], "process 1: it has no NVLink"),
    ],
)
def test_where_kernels_cannot_serve_nothing_is_made_and_a_warning_says_why(monkeypatch, made, known, ids, why):
    groups, (warned,) = along(monkeypatch, known, ids)
    assert groups is None and not made.spanning and not made.local
    with pytest.raises(AssertionError, match=f"XLA's collectives, not the kernels.*{why}"):
        raise AssertionError(warned)


def test_what_a_process_cannot_share_concerns_only_groups_that_span_it(monkeypatch, made):
    known = world({(1, 1): "its memory grows", (2, 0): "no way"})
    groups, warned = along(monkeypatch, known, [10, 11, 12, 13], (2, 2), ("data", "expert"))
    assert groups is not None and not warned


def test_more_groupings_than_windows_are_served_by_the_collectives(monkeypatch, made):
    known = world(max_groups=2)
    for ids in ([10, 12], [12, 10]):
        assert along(monkeypatch, known, ids)[0] is not None
    groups, (warned,) = along(monkeypatch, known, [11, 12])
    assert groups is None and "more than jax_ep.config.max_groups = 2" in warned
    assert along(monkeypatch, known, [10, 12])[0] is not None  # those that have windows keep them


def arena_of(monkeypatch, known, groups, num_bytes):
    monkeypatch.setattr(peers, "world", lambda: known)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = group.make_shared_arena(groups, "purpose", num_bytes)
    return there, [str(warning.message) for warning in caught]


def test_arenas_of_a_group_over_two_processes_lie_behind_the_windows_one_behind_the_other(monkeypatch, made):
    known, groups = world(), ((11, 12, 10),)
    for num_bytes in (5000, 100):
        assert arena_of(monkeypatch, known, groups, num_bytes) == (True, [])
    assert arena_of(monkeypatch, known, groups, 5000) == (True, [])
    behind = 8 * peers.window_stride()
    ids, purpose, num_bytes, at = made.arenas[0]
    assert (ids, purpose, num_bytes) == ([11, 12, 10], "purpose", 5000)
    assert at == [behind + begin for begin in (11_000, 84_000, 10_000)]
    assert made.arenas[1][2:] == (100, [address + 8192 for address in at])
    assert made.arenas[2] == made.arenas[0]


def test_arenas_within_a_process_need_no_shared_memory(monkeypatch, made):
    assert arena_of(monkeypatch, None, ((10, 11), (12, 13)), 5000) == (True, [])
    assert made.arenas == [([10, 11], "purpose", 5000, [])]


def test_where_shared_memory_is_used_up_processes_make_more(monkeypatch, made):
    known, asked = world(arena_bytes=8191), []
    monkeypatch.setattr(arenas, "make", lambda *question: asked.append(question) or {10: 1, 11: 2, 12: 3, 13: 4})
    for _ in range(2):
        assert arena_of(monkeypatch, known, ((12, 10), (13, 11)), 5000) == (True, [])
    assert made.arenas[:2] == [([12, 10], "purpose", 5000, [3, 1]), ([13, 11], "purpose", 5000, [4, 2])]
    assert asked == [(known, ((12, 10), (13, 11)), "purpose ((12, 10), (13, 11)) 8192", 8192)]


def test_where_no_memory_is_to_be_had_there_is_no_arena_and_a_warning_says_why(monkeypatch, made):
    monkeypatch.setattr(arenas, "make", lambda *question: "process 1: out of memory")
    there, (warned,) = arena_of(monkeypatch, world(arena_bytes=8191), ((10, 12),), 5000)
    assert not there and not made.arenas
    assert "jax_ep.config.arena_bytes = 8191 are used up, and more is not to be had: process 1: out of memory" in warned


def test_processes_of_several_hosts_do_not_ask_each_other():
    assert "processes [0, 2] are on several hosts" in arenas.make(world(), [(10, 11), (14, 15)], "key", 100)


@pytest.mark.parametrize("number", [-1, 2.5])
def test_arenas_of_a_number_of_bytes_that_is_none_are_refused(number):
    with pytest.raises(ValueError, match="arena_bytes must be a number of bytes"):
        jax_ep.config.arena_bytes = number
    assert jax_ep.config.arena_bytes == 1 << 28


# ---- over nodes: a GPU a process, processes 0 and 1 on one node, 2 and 3 on another

ALONE = {i: Gpu(20 + i, i, 0 if i == 0 else None) for i in range(4)}


def nodes(**facts):
    known = {"nodes": [0, 0, 1, 1], "collectives": False, "why_not": None, "rooms": {0: 4096, 1: 8192}}
    sizes = {"box_bytes": 100, "room_bytes": 1000, "max_groups": 2}
    return internode.World(**(known | sizes | facts))


@pytest.fixture
def alone(monkeypatch, made):
    monkeypatch.setattr("test_groups.GPUS", list(ALONE.values()))
    return made


def test_a_group_over_nodes_gets_rooms_and_the_kernels_for_it(monkeypatch, alone):
    groups, warned = along(monkeypatch, world(), [20, 21, 22, 23], nodes=nodes())
    assert groups == ((20, 21, 22, 23),) and not warned and group.spans_nodes(groups)
    # process, ordinal, node, where its room is mapped here: not that of another node's.
    assert alone.over_nodes[groups[0]] == [(0, 0, 0, 4096), (1, -1, 0, 8192), (2, -1, 1, 0), (3, -1, 1, 0)]
    assert not alone.spanning and not alone.local and alone.ordinals == {20: 0}
    again, _ = along(monkeypatch, world(), [20, 22, 21, 23], (2, 2), ("data", "expert"), nodes())
    assert again == ((20, 22), (21, 23)) and set(alone.over_nodes) == {(20, 21, 22, 23), (20, 22)}
    assert [berth[3] for berth in alone.over_nodes[20, 22]] == [5096, 0]  # the next room
    assert alone.unmaskable == [20, 21, 22, 23, 20, 22, 21, 23]  # in every process alike


def test_a_group_inside_a_node_is_served_as_ever_though_there_are_several(monkeypatch, alone):
    groups, _ = along(monkeypatch, None, [20, 21, 22, 23], (2, 2), ("data", "expert"), nodes(why_not="no NVSHMEM"))
    assert groups is None and not alone.over_nodes  # for another reason: nothing was exchanged


def test_where_nvshmem_is_missing_lowering_says_what_to_install(monkeypatch, alone):
    missing = nodes(why_not="process 3: nvshmem4py is not installed")
    with pytest.raises(
        RuntimeError, match=r"needs NVSHMEM\. process 3: nvshmem4py is not .* pip install 'jax_ep\[nvshmem\]'"
    ):
        along(monkeypatch, world(), [20, 21, 22, 23], nodes=missing)


@pytest.mark.parametrize(
    ("facts", "ids", "why"),
    [
        ({"collectives": True, "why_not": "no NVSHMEM"}, [20, 22], "JAX_EP_ACROSS_NODES asks for it"),
        ({}, [20, 21, 22], "as many ranks on each"),
        ({"max_groups": 0}, [20, 22], "more than jax_ep.config.max_groups = 0"),
    ],
)
def test_what_the_kernels_over_nodes_do_not_take_is_left_to_the_collectives(monkeypatch, alone, facts, ids, why):
    groups, (warned,) = along(monkeypatch, world(), ids, nodes=nodes(**facts))
    assert groups is None and why in warned and not alone.over_nodes and not alone.unmaskable


def test_a_group_over_nodes_with_a_masked_device_is_refused(monkeypatch, alone):
    def refuse(devices):
        raise RuntimeError(f"{devices} are masked")

    monkeypatch.setattr(targets, "forbid_masks", refuse)
    with pytest.raises(RuntimeError, match=r"\[20, 21, 22, 23\] are masked"):
        along(monkeypatch, world(), [20, 21, 22, 23], nodes=nodes())
    assert not alone.over_nodes


@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_a_number_of_groups_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="max_groups must be a positive integer"):
        jax_ep.config.max_groups = number
    assert jax_ep.config.max_groups == 8
