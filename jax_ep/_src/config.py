"""Process-wide settings: `jax_ep.config`."""

from __future__ import annotations

from jax_ep._src import targets


class Config:
    """Settings that concern the process, never the meaning of a call.

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

    Example:
      >>> import jax_ep
      >>> jax_ep.config.timeout = 120.0
    """

    __slots__ = ("_arena_bytes", "_max_groups", "_timeout")

    _timeout: float

    def __init__(self) -> None:
        self._max_groups = 8
        self._arena_bytes = 256 << 20
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
        return f"jax_ep.config(timeout={self._timeout}, max_groups={self._max_groups}, arena_bytes={self._arena_bytes})"


config = Config()
