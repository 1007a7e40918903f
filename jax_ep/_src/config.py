"""Process-wide settings: `jax_ep.config`."""

from __future__ import annotations


class Config:
    """Settings that concern the process, never the meaning of a call.

    Attributes:
      timeout: seconds after which a wait for another rank or process gives up and becomes an error (default 60).

    Example:
      >>> import jax_ep
      >>> jax_ep.config.timeout = 120.0
    """

    __slots__ = ("_timeout",)

    def __init__(self) -> None:
        self._timeout = 60.0

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
        self._timeout = seconds

    def __repr__(self) -> str:
        return f"jax_ep.config(timeout={self._timeout})"


config = Config()
