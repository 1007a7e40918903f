"""Memory that processes of one host make for each other while programs are lowered: arenas too large for what `initialize` shares.

A process is asked over a socket and answers from a thread: so whoever lowers first waits for nobody to lower as well,
whatever the order, and a process that is gone is named. Its answers never change, so all who ask decide alike.
Neighbours: descriptors.py carries question and answer, peers.py knows whom to ask, group.py asks.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax_ep._src import descriptors
from jax_ep._src.config import config

if TYPE_CHECKING:
    from jax_ep._src import peers


class Maker:
    """What this process makes for others and itself, and the thread that answers them at `name`, until `close`."""

    def __init__(self, memory: peers.Memory) -> None:
        self.memory = memory
        self._made: dict[str, list[peers.Region] | str] = {}
        self._making = threading.Lock()
        self._server = descriptors.Server(self._answer)
        self.name = self._server.name

    def make(self, key: str, num_bytes: int, device_ids: Sequence[int]) -> list[peers.Region] | str:
        """Of each device zeros for the arena `key`, or why there are none; the same however often it is asked for."""
        with self._making:
            if key not in self._made:
                try:
                    self._made[key] = self.memory.make(num_bytes, device_ids)
                except RuntimeError as error:
                    self._made[key] = str(error)
            return self._made[key]

    def close(self) -> None:
        """Answers no more; what was made stays, but for its descriptors."""
        self._server.close()
        with self._making:
            for regions in self._made.values():
                for region in regions if isinstance(regions, list) else []:
                    os.close(region.descriptor)
            self._made = dict.fromkeys(self._made, "this process answers no more")

    def _answer(self, question: str) -> tuple[str, list[int]]:
        made = self.make(*json.loads(question))
        if isinstance(made, str):
            return json.dumps({"why": made}), []
        return json.dumps({"bytes": [region.num_bytes for region in made]}), [region.descriptor for region in made]


def make(world: peers.World, groups: Sequence[peers.Group], key: str, num_bytes: int) -> dict[int, int] | str:
    """Where this process sees the arena `key` of each device of these groups; or why there is none, in all processes alike.

    Raises:
      RuntimeError: a process did not answer within `jax_ep.config.timeout` seconds; it is named.
    """
    device_ids: dict[int, list[int]] = {}
    for device in (device for group in groups for device in group):
        device_ids.setdefault(world.devices[device].process, []).append(device)
    if len({world.hosts[process] for process in device_ids}) > 1:
        return f"processes {sorted(device_ids)} are on several hosts, which do not ask each other"
    here: dict[int, int] = {}
    for process in sorted(device_ids, key=lambda process: process == world.me):  # itself last
        made = _ask(world, process, key, num_bytes, device_ids[process])
        if isinstance(made, str):
            return f"process {process}: {made}"
        here |= zip(device_ids[process], made, strict=True)
    return here


def _ask(world: peers.World, process: int, key: str, num_bytes: int, device_ids: list[int]) -> list[int] | str:
    """Where this process sees what that one has made for its devices, or why it has made nothing."""
    maker, name = world.maker, world.makers[process]
    assert maker is not None and name is not None  # else kernels would not serve these groups
    if process == world.me:
        made = maker.make(key, num_bytes, device_ids)
        return made if isinstance(made, str) else [region.begin for region in made]
    try:
        words, received = descriptors.ask(name, json.dumps([key, num_bytes, device_ids]), config.timeout)
    except OSError as error:
        raise RuntimeError(
            f"jax_ep: process {process} must make memory that calls of this size share, and gave process {world.me} no answer "
            f"within {config.timeout:g} s ({error}). Look at its log; with a larger jax_ep.config.arena_bytes it is not asked."
        ) from error
    try:
        answer = json.loads(words)
        if "why" in answer:
            return str(answer["why"])
        return [maker.memory.map(fd, size) for fd, size in zip(received, answer["bytes"], strict=True)]
    finally:
        for descriptor in received:
            os.close(descriptor)
