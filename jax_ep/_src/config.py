"""Process-wide settings: `jax_ep.config`."""

from __future__ import annotations

from collections.abc import Iterable

import jax

from jax_ep._src import targets

_MAX_DEAD = 64  # kMaxDead in ffi/group/barrier.h


class Config:
    """Settings that concern the process. Only `dead_devices` bears upon what a call gives.

    Attributes:
      timeout: seconds after which a wait for another rank or process gives up and becomes an error (default 60).
        Setting it takes effect at once, in programs that are compiled already and in calls that are under way: kernels
        read it while they wait. It is this process's own; set it alike in all of them.
      max_groups: for how many groupings of devices (a mesh and its expert-parallel axes) kernels can serve several
        processes (default 8); each takes about 10 MB on every GPU. Read by `initialize`, the same in every process;
        further ones are served by XLA's collectives.
      arena_bytes: memory on every GPU, shared when `initialize` is called, for what groups over several processes keep
        between calls (default 256 MiB): a size of low-latency call takes up to 8 times what a rank receives in it. Where it
        is used up, further memory is made while programs are lowered. The same in every process.
      dead_devices: devices (`jax.Device` or their ids) whose ranks take no part, in whatever group they are; none by default.
        Nobody waits for them, sends to them or writes into their memory; rows for their experts are dropped and counted in
        `num_dropped` of the rank that would have sent them; `combine` adds without them; their own results are zeros.
        Setting it takes effect with each group's next run, in compiled programs too; in a group over several processes
        with the next `initialize`, which every process whose devices are not all dead calls. RuntimeError for a device
        of a group over several nodes, as is lowering such a group with a masked device. docs/faults.md has more.

    Example:
      >>> import jax_ep
      >>> jax_ep.config.timeout = 120.0
      >>> jax_ep.config.dead_devices = [jax.devices()[3]]          # an error has named its rank: go on without it
    """

    __slots__ = ("_arena_bytes", "_dead_devices", "_max_groups", "_timeout")

    _timeout: float

    def __init__(self) -> None:
        self._max_groups = 8
        self._arena_bytes = 256 << 20
        self._dead_devices: frozenset[int] = frozenset()
        self.timeout = 60.0

    @property
    def max_groups(self) -> int:
        """For how many groupings of devices kernels can serve several processes."""
        return self._max_groups

    @max_groups.setter
    def max_groups(self, number: int) -> None:
        if number != int(number) or number < 1:
            raise ValueError(
                f"config: max_groups must be a positive integer, got {number}. Use 8 (the default) or more."
            )
        self._max_groups = int(number)

    @property
    def arena_bytes(self) -> int:
        """Memory on every GPU for what groups over several processes keep between calls."""
        return self._arena_bytes

    @arena_bytes.setter
    def arena_bytes(self, number: int) -> None:
        if number != int(number) or number < 0:
            raise ValueError(
                f"config: arena_bytes must be a number of bytes, got {number}. Use 2**28 (the default), or 0 for none."
            )
        self._arena_bytes = int(number)

    @property
    def dead_devices(self) -> frozenset[int]:
        """Ids of the devices whose ranks take no part."""
        return self._dead_devices

    @dead_devices.setter
    def dead_devices(self, devices: Iterable[int | jax.Device]) -> None:
        ids = [device.id if isinstance(device, jax.Device) else device for device in devices]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
            raise TypeError(
                f"config: dead_devices must be devices or their ids, got {list(devices)}. Pass some of jax.devices(), or []."
            )
        if len(set(ids)) > _MAX_DEAD:
            raise ValueError(
                f"config: dead_devices must be at most {_MAX_DEAD} devices, got {len(set(ids))}. Start anew without them."
            )
        targets.set_dead(sorted(set(ids)))
        self._dead_devices = frozenset(ids)

    @property
    def timeout(self) -> float:
        """Seconds after which a wait for another rank or process gives up."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        seconds = float(seconds)
        if not 0.0 < seconds < float("inf"):
            raise ValueError(
                f"config: timeout must be a positive number of seconds, got {seconds}. Use 60.0 (the default) or more."
            )
        targets.set_timeout(seconds)
        self._timeout = seconds

    def __repr__(self) -> str:
        return (
            f"jax_ep.config(timeout={self._timeout}, max_groups={self._max_groups}, arena_bytes={self._arena_bytes}, "
            f"dead_devices={sorted(self._dead_devices)})"
        )


config = Config()
