"""jax_ep.config: a new timeout is told to the compiled half at once, and nothing else changes."""

from typing import NamedTuple

import jax
import pytest

import jax_ep
from jax_ep._src import group, targets


class Gpu(NamedTuple):
    """What group.py asks of a device."""

    local_hardware_id: int
    process_index: int
    platform: str = "gpu"

    @property
    def id(self) -> int:
        return self.local_hardware_id

    @property
    def client(self) -> "Gpu":
        return self

    def local_devices(self) -> list["Gpu"]:
        return [self]


@pytest.fixture
def told(monkeypatch):
    """What the compiled half is told; the process's timeout is as before afterwards."""
    before, seconds = jax_ep.config.timeout, []
    with monkeypatch.context() as patch:
        patch.setattr(targets, "set_timeout", seconds.append)
        yield seconds
    jax_ep.config.timeout = before


def test_a_new_timeout_is_told_at_once(told):
    jax_ep.config.timeout = 7
    jax_ep.config.timeout = 2.5
    assert told == [7.0, 2.5] and jax_ep.config.timeout == 2.5


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_a_refused_timeout_is_not_told(told, seconds):
    with pytest.raises(ValueError, match="timeout"):
        jax_ep.config.timeout = seconds
    assert told == []


def test_a_timeout_that_cannot_be_told_is_not_kept(monkeypatch):
    def fail(seconds):
        raise RuntimeError("no such device")

    before = jax_ep.config.timeout
    monkeypatch.setattr(targets, "set_timeout", fail)
    with pytest.raises(RuntimeError, match="no such device"):
        jax_ep.config.timeout = before + 1
    assert jax_ep.config.timeout == before


def test_the_compiled_half_takes_it_with_or_without_gpus():
    before = jax_ep.config.timeout
    jax_ep.config.timeout = before / 2
    jax_ep.config.timeout = before
    assert jax_ep.config.timeout == before


def test_groups_are_made_once_whatever_the_timeout(told, monkeypatch):
    made = []
    monkeypatch.setattr(targets, "have_peer_access", lambda devices: True)
    monkeypatch.setattr(targets, "make_group", made.append)
    monkeypatch.setattr(targets, "set_ordinals", lambda ordinals: None)
    groups = tuple(tuple(Gpu(i, jax.process_index()) for i in ordinals) for ordinals in ((0, 1), (2, 3)))
    group._of_devices.cache_clear()
    try:
        for seconds in (1.0, 2.0):
            jax_ep.config.timeout = seconds
            assert group._of_devices(groups, None) == ((0, 1), (2, 3))
    finally:
        group._of_devices.cache_clear()
    assert made == [[0, 1], [2, 3]] and told == [1.0, 2.0]


def test_a_device_of_a_group_over_nodes_is_not_masked():
    device, other = 1_000_001, 1_000_002  # of no test's mesh: what is forbidden stays so
    targets.forbid_masks([device])
    try:
        with pytest.raises(RuntimeError, match=f"device {device} is in a group over several nodes"):
            jax_ep.config.dead_devices = [other, device]
        assert jax_ep.config.dead_devices == frozenset()
        jax_ep.config.dead_devices = [other]
        with pytest.raises(RuntimeError, match=f"device {other} is in a group over several nodes"):
            targets.forbid_masks([other])
    finally:
        jax_ep.config.dead_devices = []
