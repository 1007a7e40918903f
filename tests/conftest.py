"""Where the tests run: on 8 virtual CPU devices, or with JAX_EP_TEST_PLATFORM=gpu (also: -m gpu) on this machine's GPUs.

The contract's tests are the same on both; those marked `gpu` look at the kernels and skip without a GPU. Whatever tuning.json
says of this machine, "auto" is high throughput here, or with JAX_EP_TEST_LOW_LATENCY=TOKENS low latency wherever a rank has no
more tokens than that: two runs see both. On fewer GPUs than a case has ranks it is cut to them; JAX_EP_TEST_DEVICES=1 makes so
many virtual devices, and cuts the same.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import hypothesis
import pytest
from jaxlib.version import __version_info__

NUM_CPU_DEVICES = int(os.environ.get("JAX_EP_TEST_DEVICES", "8"))
# Without MLIR, which XLA:CPU sets up anew for every fusion: a third of what a program of many small fusions takes to compile.
# A flag that an XLA does not know ends the process, so only where it is known: RESET has flags read anew for each program.
KNOWS_FLAGS = __version_info__[:2] == (0, 11)
QUICK_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters" if KNOWS_FLAGS else ""
RESET = "--xla_flags_reset=true" if KNOWS_FLAGS else ""

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
        flags = f"{flags} --xla_force_host_platform_device_count={NUM_CPU_DEVICES}".lstrip()
    os.environ["XLA_FLAGS"] = f"{flags} {RESET}".rstrip()
    share_what_is_compiled(config)


def share_what_is_compiled(config):
    """Between this run's processes, which inherit its environment: many of them compile the same programs."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="jax_ep_compiled_", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_sessionstart(session):
    from jax_ep._src import tuning

    tuning.DEFAULT_TOKENS = int(os.environ.get("JAX_EP_TEST_LOW_LATENCY", "0"))
    tuning.table = lambda: ()


@contextlib.contextmanager
def emit_fast():
    """What XLA:CPU compiles meanwhile, here and in processes that are started, is without MLIR."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK_EMITTERS}".rstrip())
        yield


@contextlib.contextmanager
def compile_fast():
    """What is compiled meanwhile, here and in processes that are started."""
    import jax

    with emit_fast(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compiles_fast():
    """For a test that compares with a tolerance far above what XLA's optimisations change, or moved rows and integers, of which
    they change nothing. Sums of any numbers are held to the bit as users compile them: test_combine.py, test_arithmetic.py; and
    so are codes and scales: test_quantized.py, test_logfmt.py.
    """
    with compile_fast():
        yield


@pytest.fixture
def emits_fast():
    """For a test that looks at what XLA makes of a program, with its optimisations, and not at how a number is rounded."""
    with emit_fast():
        yield


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


# ---- --record FILE: what this run found, for benchmarks/results/ -----------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write a summary of this run as JSON: outcomes, commit, versions")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    path = config.getoption("--record")
    if path is None:
        return
    import jax
    import provenance

    stats = terminalreporter.stats
    skipped = {}
    for report in stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        skipped[reason] = skipped.get(reason, 0) + 1
    tests = {}
    for report in stats.get("passed", []):
        file = report.nodeid.split("::")[0]
        tests[file] = tests.get(file, 0) + 1

    devices = jax.devices()
    record = {
        "command": " ".join(["pytest", *config.invocation_params.args]).replace(path, Path(path).name),
        **provenance.sources(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{len(devices)} x {devices[0].device_kind}",
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "exit_status": int(exitstatus),
        "passed": len(stats.get("passed", [])),
        "failed": sorted(report.nodeid for name in ("failed", "error") for report in stats.get(name, [])),
        "passed_by_file": dict(sorted(tests.items())),
        "skipped": dict(sorted(skipped.items())),
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
