"""mode="auto": the table decides where it knows something alike, a plain rule where not."""

import json

import pytest

from jax_ep._src import tuning


def entry(most, ranks=4, row_bytes=14336, layout="expert", device="NVIDIA H200*"):
    return {"device": device, "ranks": ranks, "layout": layout, "row_bytes": row_bytes, "low_latency_up_to": most}


def choose(num_tokens, entries, num_ranks=4, row_bytes=14336, layout="expert", device_kind="NVIDIA H200"):
    sizes = {"num_tokens": num_tokens, "num_ranks": num_ranks, "row_bytes": row_bytes, "layout": layout}
    return tuning.choose_mode(**sizes, device_kind=device_kind, entries=entries)


@pytest.mark.parametrize("entries", [[], [entry(1024, device="NVIDIA B200*")]])
def test_without_an_entry_for_the_device_the_default_decides(entries):
    assert tuning.DEFAULT_TOKENS == 0
    assert choose(tuning.DEFAULT_TOKENS + 1, entries) == "high_throughput"


def test_an_entry_s_tokens_are_the_last_that_low_latency_serves():
    assert choose(300, [entry(300)]) == "low_latency"
    assert choose(301, [entry(300)]) == "high_throughput"
    assert choose(1, [entry(0)]) == "high_throughput"


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ({}, 100),
        ({"num_ranks": 3}, 100),  # nearer to 4 than to 2, as a ratio
        ({"num_ranks": 2}, 200),
        ({"layout": "rank"}, 300),
        ({"layout": "batched"}, 100),  # of no layout of its own: the first of the nearest
        ({"row_bytes": 5760}, 400),
        ({"layout": "rank", "row_bytes": 5760}, 300),  # layout before bytes of a row
        ({"device_kind": "NVIDIA H200 NVL"}, 100),
    ],
)
def test_the_entry_most_alike_decides_ranks_first(sizes, most):
    entries = [entry(100), entry(200, ranks=2), entry(300, layout="rank"), entry(400, row_bytes=5760)]
    assert choose(most, entries, **sizes) == "low_latency"
    assert choose(most + 1, entries, **sizes) == "high_throughput"


def test_the_table_of_the_package_can_be_read():
    for known in json.loads(tuning.TABLE.read_text()):
        assert known["ranks"] > 0 and known["row_bytes"] > 0 and known["low_latency_up_to"] >= 0
        assert known["layout"] in ("expert", "rank", "batched") and known["commit"] and known["date"] and known["us"]
    assert choose(1, None) in ("low_latency", "high_throughput")
