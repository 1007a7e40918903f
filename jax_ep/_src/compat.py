"""Every name of JAX that is not public, in one place.

The rest of jax_ep imports from here, so that a new JAX release is met in this file alone. Public but unstable
extension points (jax.extend.core, jax.interpreters) are re-exported too: they belong to the same promise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax._src import ad_checkpoint as _ad_checkpoint
from jax._src import config as _config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import distributed as _distributed
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

__all__ = [
    "Primitive",
    "ad",
    "as_varying",
    "axis_exists",
    "axis_size",
    "batching",
    "check_vma_enabled",
    "distributed_client",
    "distributed_process",
    "effectful_primitive",
    "lowers_for_export",
    "mlir",
    "named_axis_effects",
    "on_the_callers_stream",
    "pe",
    "result_aval",
    "varying_axes",
    "zero_tangent",
]


def axis_exists(name: str) -> bool:
    """Whether a shard_map (or vmap) over the axis `name` is being traced."""
    return bool(_core.get_axis_env().axis_exists(name))


def axis_size(names: Iterable[str]) -> int:
    """Product of the sizes of bound axes."""
    size = 1
    for name in names:
        size *= int(_core.get_axis_env().axis_size(name))
    return size


def lowers_for_export(ctx: Any) -> bool:
    """Whether a lowering rule's context is that of jax.export."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def check_vma_enabled() -> bool:
    """Whether shard_map is tracking which values vary over which axes."""
    return bool(_config._check_vma.value)


def varying_axes(value: Any) -> frozenset[str]:
    """Manual mesh axes over which a value, tracer or abstract value differs from device to device."""
    aval: Any = value if isinstance(value, _core.AbstractValue) else jax.typeof(value)
    return frozenset(aval.manual_axis_type.varying)


def as_varying(value: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`value`, typed as varying over `axes` as well; no data moves."""
    if not check_vma_enabled():
        return value
    missing = tuple(a for a in sorted(axes) if a not in varying_axes(value))
    return lax.pcast(value, missing, to="varying") if missing else value


def result_aval(like: Any, shape: Sequence[int], dtype: Any, varying: frozenset[str]) -> Any:
    """Abstract value of a primitive's result: `shape` and `dtype`, varying over `varying`, on the mesh of `like`."""
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    aval = like.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)
    if check_vma_enabled():
        aval = aval.update(manual_axis_type=like.manual_axis_type.update(varying=varying))
    return aval


def named_axis_effects(names: Iterable[str]) -> set[Any]:
    """What makes a primitive an error outside a shard_map over these axes; shard_map takes the effect away again."""
    return {_core.NamedAxisEffect(name) for name in names}


def effectful_primitive(name: str) -> Primitive:
    """A primitive with several results that can also be evaluated eagerly."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *args, **params: _dispatch.apply_primitive(primitive, *args, **params))
    return primitive


def zero_tangent(primal: Any) -> Any:
    """A symbolic zero for the tangent of a value."""
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def give_names_a_transpose() -> None:
    """`checkpoint_name` is the identity, but JAX gives it no transpose: `linear_transpose` through a name would fail."""
    ad.primitive_transposes.setdefault(_ad_checkpoint.name_p, lambda ct, x, *, name: [ct])


def on_the_callers_stream[**P, T](f: Callable[P, T]) -> Callable[P, T]:
    """`f`, inside `compute_on(compute_type="gpu_stream:...")` too: it then runs on the stream of the call around it.

    JAX marks every equation traced there, not only the one call that XLA puts on a stream. A nested jit (jnp.where is one)
    then becomes an asynchronous call inside an asynchronous call, which XLA:GPU refuses; unmarked it is inlined.
    """

    @functools.wraps(f)
    def unmarked(*args: P.args, **kwargs: P.kwargs) -> T:
        compute_type = _config.compute_on_context_manager
        if not str(compute_type.value).startswith("gpu_stream:"):
            return f(*args, **kwargs)
        around = compute_type.swap_local(None)
        try:
            return f(*args, **kwargs)
        finally:
            compute_type.set_local(around)

    return unmarked


def distributed_client() -> Any | None:
    """The client of JAX's coordination service, or None where `jax.distributed.initialize()` was not called."""
    return _distributed.global_state.client


def distributed_process() -> tuple[int, int]:
    """This process's index and how many there are; unlike `jax.process_index()` it starts no backend and waits for nobody."""
    return _distributed.global_state.process_id, _distributed.global_state.num_processes
