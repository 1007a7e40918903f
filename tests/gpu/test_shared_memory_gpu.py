"""Memory that is exported and mapped again, here in one process: the second mapping shows what is in the first."""

import ctypes
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep._src import doctor, peers, targets

pytestmark = pytest.mark.gpu


def read(address, count):
    """`count` 32-bit words of device memory."""
    words = np.zeros(count, np.int32)
    code = doctor._driver().cuMemcpyDtoH_v2(
        words.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address), words.nbytes
    )
    assert code == 0
    return words


def write(address, value, count):
    assert doctor._driver().cuMemsetD32_v2(ctypes.c_uint64(address), value, count) == 0
    assert doctor._driver().cuCtxSynchronize() == 0


def test_windows_are_zero_and_the_same_memory_where_they_are_mapped_again():
    ordinals = [device.local_hardware_id for device in jax.local_devices()]
    shared = targets.make_shared_memory(ordinals[0], 3 << 20, ordinals)
    try:
        again = targets.import_memory(shared.fd, shared.bytes, ordinals)
    finally:
        os.close(shared.fd)
    assert shared.bytes >= 3 << 20 and again != shared.begin
    assert not read(shared.begin, shared.bytes // 4).any()
    write(again + 4096, 7, 5)
    np.testing.assert_array_equal(read(shared.begin + 4096, 6), [7, 7, 7, 7, 7, 0])


def test_arrays_are_seen_in_xlas_memory_where_it_is_mapped_again():
    device = jax.local_devices()[0]
    memory = peers.CudaMemory()
    if os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0"):
        with pytest.raises(RuntimeError, match="XLA_PYTHON_CLIENT_PREALLOCATE"):
            memory.xla_memory(device)
        return
    region = memory.xla_memory(device)
    try:
        here = memory.map(region.descriptor, region.num_bytes)
    finally:
        os.close(region.descriptor)
    x = jax.device_put(jnp.arange(1000, dtype=jnp.int32), device).block_until_ready()
    offset = x.unsafe_buffer_pointer() - region.begin
    assert 0 <= offset < region.num_bytes
    np.testing.assert_array_equal(read(here + offset, 1000), np.arange(1000))


def test_what_is_no_descriptor_of_memory_is_an_error():
    ordinals = [device.local_hardware_id for device in jax.local_devices()]
    with open(os.devnull) as file, pytest.raises(RuntimeError, match="cuMemImportFromShareableHandle"):  # noqa: PTH123
        targets.import_memory(file.fileno(), 2 << 20, ordinals)
