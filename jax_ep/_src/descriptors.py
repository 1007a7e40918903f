"""File descriptors from one process of this host to another: an abstract Unix socket, for the same user only.

A process offers its descriptors for as long as it likes; whoever of the same user connects is sent all of them at once.
Neighbour: peers.py, which says what is behind them.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

MAX_DESCRIPTORS = 253  # of one message: SCM_MAX_FD of Linux


def host() -> str:
    """The same for processes that reach each other's abstract sockets: this start of this kernel, this network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


class Offer:
    """Sends `descriptors` to every process of this user that asks at `name`, from a thread, until `close`.

    The descriptors stay the caller's until `close`, which closes them too.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        if len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"Offer: at most {MAX_DESCRIPTORS} descriptors fit one message, got {len(descriptors)}.")
        self._descriptors = list(descriptors)
        self.name = f"jax_ep-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(socket.SOMAXCONN)
        threading.Thread(target=self._serve, name="jax_ep descriptors", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):  # a caller that has gone is no matter
                connection.settimeout(10)
                if _user_of(connection) == os.getuid():
                    socket.send_fds(connection, [b"\0"], self._descriptors)

    def close(self) -> None:
        """Ends the offer; what was sent stays open at those who have it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def fetch(name: str, count: int, timeout: float) -> list[int]:
    """The `count` descriptors that the process behind `name` offers; they are the caller's to close.

    Raises:
      OSError: nobody offers there, not in time, or not the same user; or it offers another number.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(f"\0{name}")
        user = _user_of(connection)
        if user != os.getuid():
            raise PermissionError(f"{name} is offered by user {user}, not by this one, {os.getuid()}")
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        _, ancillary, flags, _ = connection.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    if len(received) != count or flags & socket.MSG_CTRUNC:
        for descriptor in received:
            os.close(descriptor)
        raise ConnectionError(f"{name} sent {len(received)} descriptors where {count} were due")
    return list(received)


def _user_of(connection: socket.socket) -> int:
    """Who is at the other end, as the kernel says."""
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return int(user)
