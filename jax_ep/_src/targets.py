"""Loads the compiled half, `jax_ep._core`, and registers its XLA FFI handlers for CUDA. ffi/module.cc lists them."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import jax

BARRIER = "jax_ep_barrier"
COMBINE = "jax_ep_combine"
COMBINE_DONE = "jax_ep_combine_done"
COMBINE_GRAD = "jax_ep_combine_grad"
COMBINE_START = "jax_ep_combine_start"
DISPATCH = "jax_ep_dispatch"
DISPATCH_CACHED = "jax_ep_dispatch_cached"
DISPATCH_DONE = "jax_ep_dispatch_done"
DISPATCH_LAYOUT = "jax_ep_dispatch_layout"
DISPATCH_START = "jax_ep_dispatch_start"
INTERNODE_BARRIER = "jax_ep_internode_barrier"
INTERNODE_COMBINE = "jax_ep_internode_combine"
INTERNODE_DISPATCH = "jax_ep_internode_dispatch"
INTERNODE_DISPATCH_CACHED = "jax_ep_internode_dispatch_cached"
INTERNODE_NOTIFY = "jax_ep_internode_notify"
IS_DEAD = "jax_ep_is_dead"
LOW_LATENCY_COMBINE = "jax_ep_low_latency_combine"
LOW_LATENCY_COMBINE_DONE = "jax_ep_low_latency_combine_done"
LOW_LATENCY_COMBINE_START = "jax_ep_low_latency_combine_start"
LOW_LATENCY_DISPATCH = "jax_ep_low_latency_dispatch"
LOW_LATENCY_DISPATCH_CACHED = "jax_ep_low_latency_dispatch_cached"
LOW_LATENCY_DISPATCH_DONE = "jax_ep_low_latency_dispatch_done"
LOW_LATENCY_DISPATCH_START = "jax_ep_low_latency_dispatch_start"
LOW_LATENCY_NOTIFY = "jax_ep_low_latency_notify"
NOTIFY = "jax_ep_notify"

INTERNODE_DISPATCHES = {
    DISPATCH: INTERNODE_DISPATCH,
    DISPATCH_CACHED: INTERNODE_DISPATCH_CACHED,
    NOTIFY: INTERNODE_NOTIFY,
}

Version = tuple[int, int]


def installed_ffi_api(include_dir: str | Path) -> Version:
    """The (major, minor) version of XLA's FFI in a jaxlib, told by the headers it ships."""
    header = (Path(include_dir) / "xla/ffi/api/c_api.h").read_text()
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise ImportError(f"jax_ep: {include_dir}/xla/ffi/api/c_api.h must define XLA_FFI_API_MAJOR and _MINOR.")
    return int(major[1]), int(minor[1])


def check_ffi_api(built: Version, installed: Version) -> None:
    """Raises unless handlers built with the first version run under the second.

    XLA refuses handlers that are newer than itself when the CUDA backend starts, and loses the whole backend over it.
    """
    if installed[0] != built[0] or installed < built:
        raise ImportError(
            f"jax_ep: jaxlib must have XLA FFI {built[0]}.{built[1]} or a later {built[0]}.x, for which jax_ep was built, "
            f"got {installed[0]}.{installed[1]} in jaxlib {metadata.version('jaxlib')}. Upgrade it with pip install -U jax jaxlib."
        )


try:
    import jax_ep._core as _core
except ImportError as error:
    raise ImportError(
        f"jax_ep: the compiled module jax_ep._core must be importable, got {error}. "
        "Build it with pip install . in the source tree, and start Python elsewhere: the tree itself holds only sources."
    ) from error

check_ffi_api(_core.ffi_api, installed_ffi_api(jax.ffi.include_dir()))
for _target, _handler in _core.handlers().items():
    jax.ffi.register_ffi_target(_target, _handler, platform="CUDA")
for _target, _handler in _core.host_handlers().items():
    jax.ffi.register_ffi_target(_target, _handler, platform="cpu")

Berth = _core.Berth
Place = _core.Place
Purpose = _core.Purpose
box_bytes = _core.box_bytes
built_ffi_api: Version = _core.ffi_api
combine_landing_bytes = _core.combine_landing_bytes
cuda_version: Version = _core.cuda_version
dispatch_landing_bytes = _core.dispatch_landing_bytes
export_allocation = _core.export_allocation
forbid_masks = _core.forbid_masks
has_failed_spanning = _core.has_failed_spanning
have_peer_access = _core.have_peer_access
import_memory = _core.import_memory
install_internode = _core.install_internode
internode_plan = _core.internode_plan
landing_arena_bytes = _core.landing_arena_bytes
low_latency_arena_bytes = _core.low_latency_arena_bytes
low_latency_combine_bytes = _core.low_latency_combine_bytes
low_latency_dispatch_bytes = _core.low_latency_dispatch_bytes
make_group = _core.make_group
make_internode_group = _core.make_internode_group
make_shared_arena = _core.make_shared_arena
make_shared_memory = _core.make_shared_memory
make_spanning_group = _core.make_spanning_group
nodes_of = _core.nodes_of
resume = _core.resume
room_bytes = _core.room_bytes
set_dead = _core.set_dead
set_ordinals = _core.set_ordinals
set_timeout = _core.set_timeout
spanning_generation = _core.spanning_generation
window_bytes: int = _core.window_bytes
