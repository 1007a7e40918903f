"""Where the tests run: on 8 virtual CPU devices, or with JAX_EP_TEST_PLATFORM=gpu (also: -m gpu) on this machine's GPUs.

The contract's tests are the same on both; those marked `gpu` look at the kernels and skip without a GPU.
"""

import os

import hypothesis
import pytest

NUM_CPU_DEVICES = 8

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def on_gpu(config):
    return os.environ.get("JAX_EP_TEST_PLATFORM") == "gpu" or config.option.markexpr == "gpu"


def pytest_configure(config):
    """Before any test module imports jax."""
    if on_gpu(config):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={NUM_CPU_DEVICES}".lstrip()


def pytest_collection_modifyitems(config, items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    reason = "needs a GPU: JAX_EP_TEST_PLATFORM=gpu runs it"
    if on_gpu(config):
        import jax

        if jax.devices()[0].platform == "gpu":
            return
        reason = f"needs a GPU: jax has {jax.devices()[0].platform} devices only"
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason=reason))
