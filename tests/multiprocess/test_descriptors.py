"""File descriptors go to processes of the same user, all of them, and to nobody else."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jax_ep._src import descriptors

# Another user is a process that was root's; without jax, which takes seconds to import.
OTHER_USER = f"""
import importlib.util, os, socket, sys
spec = importlib.util.spec_from_file_location("descriptors", {descriptors.__file__!r})
descriptors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(descriptors)
os.setuid(65534)
"""

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def memory(text):
    descriptor = os.memfd_create("jax_ep test")
    os.write(descriptor, text.encode())
    return descriptor


def test_what_is_offered_comes_in_order_and_often():
    offer = descriptors.Offer([memory(text) for text in ("first", "second", "third")])
    try:
        for _ in range(3):
            received = descriptors.fetch(offer.name, 3, timeout=10)
            assert [os.pread(descriptor, 99, 0) for descriptor in received] == [b"first", b"second", b"third"]
            assert not any(os.get_inheritable(descriptor) for descriptor in received)
            for descriptor in received:
                os.close(descriptor)
        with pytest.raises(ConnectionError, match="sent 3 descriptors where 2 were due"):
            descriptors.fetch(offer.name, 2, timeout=10)
    finally:
        offer.close()


def join_servers():
    """Each ends soon after its offer, on a busy machine a little later."""
    for thread in threading.enumerate():
        if thread.name == "jax_ep descriptors":
            thread.join(10)


def test_after_the_end_of_an_offer_nobody_answers_and_nothing_is_left():
    join_servers()  # of tests before
    before = set(Path("/proc/self/fd").iterdir()), threading.active_count()
    offer = descriptors.Offer([memory("gone")])
    offer.close()
    with pytest.raises(OSError):  # noqa: PT011  refused, whatever the kernel says
        descriptors.fetch(offer.name, 1, timeout=10)
    join_servers()
    assert (set(Path("/proc/self/fd").iterdir()), threading.active_count()) == before


def test_more_than_a_message_holds_is_refused_at_once():
    with pytest.raises(ValueError, match="at most 253 descriptors fit one message, got 254"):
        descriptors.Offer(range(254))


@needs_root
def test_another_user_is_sent_nothing():
    offer = descriptors.Offer([memory("secret")])
    ask = (
        OTHER_USER
        + f"""
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect("\\0{offer.name}")
print(socket.recv_fds(connection, 1, 9)[:2])
"""
    )
    try:
        answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
        assert answer.stdout == "(b'', [])\n"
        (received,) = descriptors.fetch(offer.name, 1, timeout=10)  # this user still is
        os.close(received)
    finally:
        offer.close()


@needs_root
def test_nothing_is_taken_from_another_user():
    serve = (
        OTHER_USER
        + """
offer = descriptors.Offer([os.memfd_create("trap")])
print(offer.name, flush=True)
sys.stdin.read()
"""
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", serve], **pipes) as server:
        try:
            name = server.stdout.readline().strip()
            with pytest.raises(PermissionError, match="is offered by user 65534, not by this one, 0"):
                descriptors.fetch(name, 1, timeout=10)
        finally:
            server.stdin.close()


def test_a_silent_socket_is_an_error_in_time():
    import socket

    name = "jax_ep test silent"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{name}{os.getpid()}")
        listener.listen()
        with pytest.raises(TimeoutError):
            descriptors.fetch(f"{name}{os.getpid()}", 1, timeout=0.3)
