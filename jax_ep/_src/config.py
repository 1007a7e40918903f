"""Process-wide settings: `jax_ep.config`."""

from __future__ import annotations

from jax_ep._src import targets


class Config:
    """Settings that concern the process, never the meaning of a call.

    Attributes:
      timeout: seconds after which a wait for another rank or process gives up and becomes an error (default 60).
        Setting it takes effect at once, in programs that are compiled already and in calls that are under way: kernels
        read it while they wait. It is this process's own; set it alike in all of them.

    Example:
      >>> import jax_ep
      >>> jax_ep.config.timeout = 120.0
    """

    __slots__ = ("_timeout",)

    _timeout: float

    def __init__(self) -> None:
        self.timeout = 60.0

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
        return f"jax_ep.config(timeout={self._timeout})"


config = Config()
