"""jax_ep: expert-parallel communication for Mixture-of-Experts layers in JAX. README.md shows it at work."""

from jax_ep._src import autodiff as _autodiff  # noqa: F401  derivatives
from jax_ep._src import batching as _batching  # noqa: F401  vmap
from jax_ep._src import cuda as _cuda  # noqa: F401  kernels
from jax_ep._src.barrier import barrier
from jax_ep._src.bootstrap import finalize, initialize
from jax_ep._src.combine import combine, combine_done, combine_start
from jax_ep._src.config import config
from jax_ep._src.dispatch import dispatch, dispatch_cached, dispatch_done, dispatch_start
from jax_ep._src.handle import Dispatched, Handle
from jax_ep._src.layout import dispatch_layout
from jax_ep._src.quantized import Quantized, dequantize, quantize

__all__ = [
    "Dispatched",
    "Handle",
    "Quantized",
    "barrier",
    "combine",
    "combine_done",
    "combine_start",
    "config",
    "dequantize",
    "dispatch",
    "dispatch_cached",
    "dispatch_done",
    "dispatch_layout",
    "dispatch_start",
    "finalize",
    "initialize",
    "quantize",
]
