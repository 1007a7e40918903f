"""A byte-level Mixture-of-Experts transformer whose experts are spread over the devices of one mesh axis.

Everything here is per rank, to be called inside shard_map: B sequences of S bytes are this rank's share of the
batch, D is dim, E the number of experts, L = E/R those that live on this rank, F their hidden size, K is topk.
Tokens are data-parallel over the same axis. The layer that talks to other ranks is `expert_parallel`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

from .data import VOCABULARY

AXIS = "expert"
HEAD_DIM = 32


@dataclasses.dataclass(frozen=True)
class Config:
    dim: int = 128
    layers: int = 3
    experts: int = 16
    topk: int = 2
    capacity_factor: float | None = 1.5  # room on a rank for choices, 1 is its fair share; None: for all there are
    wire: str | None = None  # what travels: None is x as it is
    dtype: str = "float32"  # of the activations; parameters are f32
    balance: float = 0.03  # weight of the load-balancing loss


class Layer(NamedTuple):
    attention_norm: Array  # f32[D]
    qkv: Array  # f32[D, 3, heads, head_dim]
    attention_out: Array  # f32[heads, head_dim, D]
    moe_norm: Array  # f32[D]
    router: Array  # f32[D, E]
    w_in: Array  # f32[L, D, F]
    w_out: Array  # f32[L, F, D]


class Params(NamedTuple):
    embedding: Array  # f32[256, D]
    layers: list[Layer]
    norm: Array  # f32[D]
    unembedding: Array  # f32[D, 256]


class Stats(NamedTuple):
    loss: Array  # f32[], cross entropy and balance loss
    cross_entropy: Array  # f32[], nats a byte
    load: Array  # f32[layers, E], choices of an expert relative to a fair share: 1 is balanced
    dropped: Array  # f32[], share of the choices that found no room


# x[B, S, D], topk_idx[B, S, K], gates[B, S, K], w_in, w_out -> the experts' sum [B, S, D], dropped choices s32[1]
ExpertFfn = Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]


def init_params(key: Array, config: Config) -> Params:
    """All parameters, with all E experts; param_specs says how they are spread."""
    dim, heads, hidden = config.dim, config.dim // HEAD_DIM, 2 * config.dim
    keys = iter(jax.random.split(key, 2 + 5 * config.layers))

    def matrix(*shape: int, fan_in: int) -> Array:
        return jax.random.normal(next(keys), shape) / math.sqrt(fan_in)

    def layer() -> Layer:
        return Layer(
            attention_norm=jnp.ones(dim),
            qkv=matrix(dim, 3, heads, HEAD_DIM, fan_in=dim),
            attention_out=matrix(heads, HEAD_DIM, dim, fan_in=dim),
            moe_norm=jnp.ones(dim),
            router=matrix(dim, config.experts, fan_in=dim),
            w_in=matrix(config.experts, dim, hidden, fan_in=dim),
            w_out=matrix(config.experts, hidden, dim, fan_in=hidden),
        )

    return Params(
        embedding=matrix(VOCABULARY, dim, fan_in=1),
        layers=[layer() for _ in range(config.layers)],
        norm=jnp.ones(dim),
        unembedding=matrix(dim, VOCABULARY, fan_in=dim),
    )


def param_specs(config: Config) -> Params:
    """Experts are split over the axis, everything else is replicated."""
    layer = Layer(P(), P(), P(), P(), P(), w_in=P(AXIS), w_out=P(AXIS))
    return Params(P(), [layer] * config.layers, P(), P())


def place_batch(tokens: np.ndarray, mesh: Mesh) -> Array:
    """Splits s32[batch, S + 1] over the ranks; with several processes each places only what its devices hold."""
    return jax.make_array_from_callback(tokens.shape, NamedSharding(mesh, P(AXIS)), lambda index: tokens[index])


def over_ranks(function: Callable[..., Any], config: Config, mesh: Mesh, out_specs: Any) -> Callable[..., Any]:
    """Function(params, tokens[B, ...]) of one rank -> the same of params and tokens[batch, ...] over all ranks."""
    return jax.shard_map(function, mesh=mesh, in_specs=(param_specs(config), P(AXIS)), out_specs=out_specs)


def send(x: Array, topk_idx: Array, gates: Array, config: Config) -> tuple[Array, jax_ep.Dispatched, jax_ep.Handle]:
    """Sends each choice to its expert's rank: the rows to compute on, in x's dtype, what came with them, the way back."""
    recv, handle = jax_ep.dispatch(
        x,
        topk_idx,
        gates,
        axis_name=AXIS,
        num_experts=config.experts,
        max_recv_tokens=max_recv_tokens(config, topk_idx.size),
        wire=config.wire,
    )
    return (recv.x if config.wire is None else jax_ep.dequantize(recv.x)), recv, handle


def expert_parallel(config: Config) -> ExpertFfn:
    """Each choice travels to its expert's rank, goes through the expert there, and comes back times its gate."""

    def ffn(x: Array, topk_idx: Array, gates: Array, w_in: Array, w_out: Array) -> tuple[Array, Array]:
        rows, recv, handle = send(x, topk_idx, gates, config)
        hidden = jax.nn.silu(lax.ragged_dot(rows, w_in, recv.group_sizes))
        y = lax.ragged_dot(hidden, w_out, recv.group_sizes)
        return jax_ep.combine(y, handle, recv.weights), recv.num_dropped

    return ffn


def dense(x: Array, topk_idx: Array, gates: Array, w_in: Array, w_out: Array) -> tuple[Array, Array]:
    """The same meaning without communication: every expert on every token, times its gate (0 where not chosen)."""
    one_hot = jax.nn.one_hot(topk_idx, w_in.shape[0], dtype=x.dtype)  # [B, S, K, E]
    gate = jnp.einsum("bske,bsk->bse", one_hot, gates.astype(x.dtype))
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, w_in))
    return jnp.einsum("bsef,efd,bse->bsd", hidden, w_out, gate), jnp.zeros(1, jnp.int32)


def max_recv_tokens(config: Config, num_choices: int) -> int | None:
    """Rows a rank has room for: with balanced experts it receives as many choices as its own tokens make."""
    if config.capacity_factor is None:
        return None
    return min(math.ceil(config.capacity_factor * num_choices), num_choices * lax.axis_size(AXIS))


def loss(params: Params, tokens: Array, config: Config, *, parallel: bool = True) -> tuple[Array, Stats]:
    """What tokens[B, S + 1] of all ranks cost: mean cross entropy, plus the balance loss. Dense: on one device, alone."""
    ffn = expert_parallel(config) if parallel else dense
    mean = partial(lax.pmean, axis_name=AXIS) if parallel else lambda value: value
    logits, balance, load, dropped = forward(params, tokens[:, :-1], config, ffn, mean)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    cross_entropy = mean(-jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean())
    total = cross_entropy + config.balance * balance
    return total, Stats(total, cross_entropy, load, dropped)


def loss_and_grads(params: Params, tokens: Array, config: Config, *, parallel: bool = True) -> tuple[Stats, Params]:
    """What a training step needs. The loss is the same on every rank (pmean), so shard_map sums the gradients of what
    is replicated over the ranks, and an expert's stay on its rank: combine and dispatch, transposed, brought them there.
    """
    grads, stats = jax.grad(loss, has_aux=True)(params, tokens, config, parallel=parallel)
    return stats, grads


def forward(
    params: Params, tokens: Array, config: Config, ffn: ExpertFfn, mean: Callable[[Array], Array]
) -> tuple[Array, Array, Array, Array]:
    """tokens[B, S] -> logits[B, S, 256], balance loss f32[], load f32[layers, E], share of dropped choices f32[]."""
    x = params.embedding.astype(config.dtype)[tokens]
    routed = []
    for layer in params.layers:
        x = x + attention(layer, rms_norm(x, layer.attention_norm))
        y, *layer_stats = moe(layer, rms_norm(x, layer.moe_norm), config, ffn, mean)
        x = x + y
        routed.append(layer_stats)
    balance, load, dropped = (jnp.stack(values) for values in zip(*routed, strict=True))
    logits = rms_norm(x, params.norm) @ params.unembedding.astype(x.dtype)
    return logits, balance.mean(), load, dropped.mean()


def moe(
    layer: Layer, x: Array, config: Config, ffn: ExpertFfn, mean: Callable[[Array], Array]
) -> tuple[Array, Array, Array, Array]:
    """x[B, S, D] -> y[B, S, D], balance loss f32[], load f32[E], share of dropped choices f32[]."""
    probs = jax.nn.softmax(x.astype(jnp.float32) @ layer.router)
    gates, topk_idx = lax.top_k(probs, config.topk)
    y, num_dropped = ffn(x, topk_idx, gates, layer.w_in.astype(x.dtype), layer.w_out.astype(x.dtype))
    chosen = jax.nn.one_hot(topk_idx, config.experts).mean(axis=(0, 1, 2))  # sums to 1 over the experts
    load = config.experts * mean(chosen)
    balance = jnp.sum(load * mean(probs.mean(axis=(0, 1))))  # Switch Transformer, eq. 4: 1 when balanced
    return y, balance, load, mean(num_dropped.sum() / topk_idx.size)


def attention(layer: Layer, x: Array) -> Array:
    """Causal self-attention with rotary positions, [B, S, D] -> [B, S, D]."""
    q, k, v = jnp.moveaxis(jnp.einsum("bsd,dcnh->bscnh", x, layer.qkv.astype(x.dtype)), 2, 0)
    out = jax.nn.dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
    return jnp.einsum("bsnh,nhd->bsd", out, layer.attention_out.astype(x.dtype))


def rotary(x: Array) -> Array:
    """Turns pairs of columns of x[B, S, heads, head_dim] by an angle that grows with the position."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)  # f32[S, half]
    cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def rms_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)
