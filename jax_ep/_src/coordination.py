"""What processes tell each other through JAX's coordination service: a key-value store, no collective and no device.

`client` is the service's (compat.distributed_client). Neighbours: bootstrap.py and peers.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Container
from typing import Any

import jax

from jax_ep._src.config import config


def gather(client: Any, topic: str, mine: Any, me: int, num_processes: int, without: Container[int] = ()) -> list[Any]:
    """Every process's word on `topic`, in the order of the processes, `without` some; each is anything that JSON holds.

    Raises:
      RuntimeError: processes did not say theirs within `jax_ep.config.timeout` seconds; they are named.
    """
    client.key_value_set(f"jax_ep/{topic}/{me}", json.dumps(mine), allow_overwrite=True)
    deadline = time.monotonic() + config.timeout
    words, missing = [], []
    for process in range(num_processes):
        if process in without:
            continue
        milliseconds = max(1, round(1000 * (deadline - time.monotonic())))
        try:
            words.append(json.loads(client.blocking_key_value_get(f"jax_ep/{topic}/{process}", milliseconds)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            missing.append(process)
    if missing:
        raise RuntimeError(
            f"initialize: each of the {num_processes} processes must call jax_ep.initialize() within {config.timeout:g} s, "
            f"got no word from process {', '.join(map(str, missing))} on process {me} ({topic}). Look at its log, or raise "
            "jax_ep.config.timeout."
        )
    return words


def somebody_spoke(client: Any, topic: str) -> bool:
    """Whether a process has said its word on `topic`."""
    return bool(client.key_value_dir_get(f"jax_ep/{topic}/"))


def claim(client: Any, topic: str, owner: str, count: int) -> int | None:
    """The number from 0 to `count` - 1 that belongs to `owner`: the first free one, the same for every process that asks.

    None where all are taken by others. Nothing is ever given back, so all who ask get the same answer in any order.
    """
    return next((number for number in range(count) if _entry(client, topic, number, owner) == owner), None)


def allot(client: Any, topic: str, owner: str, amount: int, total: int) -> int | None:
    """Where `owner`'s `amount` begins among `total`, the same for every process that asks; None where it does not fit.

    Allotments lie one behind the other in the order of their first asking, and none is ever given back: what has not
    fitted once never will, so here too all who ask get the same answer in any order.
    """
    begin, number, mine = 0, 0, json.dumps([owner, amount])
    while True:
        fits = begin + amount <= total
        entry = _entry(client, topic, number, mine if fits else None)
        if entry is None:
            return None
        if entry == mine:
            return begin
        begin += json.loads(entry)[1]
        number += 1


def _entry(client: Any, topic: str, number: int, mine: str | None) -> str | None:
    """What stands under a set-once number: what was there, else `mine`, which then is; None where there is neither."""
    key = f"jax_ep/{topic}/{number}"
    if mine is not None:
        try:
            client.key_value_set(key, mine)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        else:
            return mine
    try:
        return str(client.key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None
