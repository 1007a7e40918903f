"""initialize and finalize: who is missing or different is named, in time; calling again, alone and late is fine."""

import importlib.metadata
import types

import jax
import launch
import numpy as np
import pytest

import jax_ep
from jax_ep._src import bootstrap, targets


@pytest.mark.multiprocess
def test_two_processes_meet_or_are_told_who_is_missing_or_different():
    first, second = launch.run("bootstrap_worker:steps", devices_per_process=1)

    assert "each of the 2 processes must call jax_ep.initialize() within 1.5 s" in first["alone"]
    assert "got no word from process 1" in first["alone"]
    assert 1.4 < first["alone_seconds"] < 6
    assert not first["backend_started"]  # JAX's own start would have waited for the missing process

    for seen in (first, second):
        assert seen["together"] is None
        assert seen["again"] is None
    assert first["finalize_seconds"] < 1
    assert first["after_finalize_alone"] is None

    installed = importlib.metadata.version("jax-ep")
    theirs, mine = (
        f"jax-ep {v}, jaxlib {jax.lib.__version__}, max_groups 8, arena_bytes 268435456" for v in ("9.9.9", installed)
    )
    assert f"got {theirs} on process 1 and {mine} on process 0" in first["versions"]
    assert f"got {mine} on process 0 and {theirs} on process 1" in second["versions"]
    assert first["reinstalled"] is None and second["reinstalled"] is None


class Store:
    """A key-value store in which the others have said their words already."""

    def __init__(self, words):
        self.words = words

    def key_value_set(self, key, value, allow_overwrite):
        self.words[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.words:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.words[key]


def test_a_new_beginning_waits_for_no_process_whose_devices_are_all_masked(monkeypatch):
    """Three processes of two devices each; process 1 has died. With one of its devices masked it is still waited for."""
    resumed = []
    devices = [types.SimpleNamespace(id=i, process_index=i // 2) for i in range(6)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(targets, "has_failed_spanning", lambda: True)
    monkeypatch.setattr(targets, "spanning_generation", lambda: 3)
    monkeypatch.setattr(targets, "resume", resumed.append)
    monkeypatch.setitem(bootstrap._state, "resumed", 0)
    monkeypatch.setattr(jax_ep.config, "_dead_devices", frozenset({2}))
    store = Store({"jax_ep/resume 0/2": "5"})
    with pytest.raises(RuntimeError, match="got no word from process 1 "):
        bootstrap._resume(store, 0, 3)
    assert resumed == []
    monkeypatch.setattr(jax_ep.config, "_dead_devices", frozenset({2, 3}))
    bootstrap._resume(store, 0, 3)
    assert resumed == [6]


def test_a_single_process_needs_none_of_it():
    for _ in range(2):
        jax_ep.initialize()
        jax_ep.initialize()
        jax_ep.finalize()
        jax_ep.finalize()
    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    barrier = jax.shard_map(lambda: jax_ep.barrier("expert"), mesh=mesh, in_specs=(), out_specs=jax.P("expert"))
    np.testing.assert_array_equal(jax.jit(barrier)(), jax.device_count())
