"""File descriptors from one process of this host to another: an abstract Unix socket, for the same user only.

A process answers questions, for as long as it likes; whoever of the same user connects and asks is sent words and descriptors.
Neighbours: peers.py and arenas.py, which say what is behind them.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

MAX_DESCRIPTORS = 253  # of one message: SCM_MAX_FD of Linux


def host() -> str:
    """The same for processes that reach each other's abstract sockets: this start of this kernel, this network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


class Server:
    """Answers every process of this user that asks at `name`, from a thread, until `close`.

    `answer` makes of a question words and descriptors; these stay open here, as they were.
    """

    def __init__(self, answer: Callable[[str], tuple[str, Sequence[int]]]) -> None:
        self._answer = answer
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
                    words, descriptors = self._answer(_read(connection))
                    socket.send_fds(connection, [b"\0"], descriptors)
                    connection.sendall(words.encode())

    def close(self) -> None:
        """Answers no more; what was sent stays open at those who have it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()


class Offer(Server):
    """Sends `descriptors` to everybody, whatever the question.

    The descriptors stay the caller's until `close`, which closes them too.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        if len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"Offer: at most {MAX_DESCRIPTORS} descriptors fit one message, got {len(descriptors)}.")
        self._descriptors = list(descriptors)
        super().__init__(lambda question: ("", self._descriptors))

    def close(self) -> None:
        """Ends the offer."""
        super().close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def ask(name: str, question: str, timeout: float) -> tuple[str, list[int]]:
    """What the process behind `name` answers: words, and descriptors that are the caller's to close.

    Raises:
      OSError: nobody answers there, not in time, or not the same user.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(f"\0{name}")
        user = _user_of(connection)
        if user != os.getuid():
            raise PermissionError(f"{name} is offered by user {user}, not by this one, {os.getuid()}")
        connection.sendall(question.encode())
        connection.shutdown(socket.SHUT_WR)
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        begin, ancillary, flags, _ = connection.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
        received = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
        try:
            if not begin or flags & socket.MSG_CTRUNC:
                raise ConnectionError(f"{name} gave no answer, or more descriptors than a message holds")
            return _read(connection), list(received)
        except OSError:
            for descriptor in received:
                os.close(descriptor)
            raise


def fetch(name: str, count: int, timeout: float) -> list[int]:
    """The `count` descriptors that the process behind `name` offers; they are the caller's to close.

    Raises:
      OSError: nobody offers there, not in time, or not the same user; or it offers another number.
    """
    _, received = ask(name, "", timeout)
    if len(received) != count:
        for descriptor in received:
            os.close(descriptor)
        raise ConnectionError(f"{name} sent {len(received)} descriptors where {count} were due")
    return received


def _read(connection: socket.socket) -> str:
    """All that comes, until the other end has no more to say."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts).decode()


def _user_of(connection: socket.socket) -> int:
    """Who is at the other end, as the kernel says."""
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return int(user)
