"""Named cases: sizes that tests and benchmarks share. A benchmark on fewer ranks says `dataclasses.replace(case, num_ranks=4)`."""

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    num_tokens: int  # T, a rank
    hidden: int  # H
    num_topk: int  # K
    num_experts: int  # E
    num_ranks: int  # R
    layout: str = "expert"
    dtype: str = "bfloat16"
    max_recv_tokens: int | None = None
    expert_alignment: int = 1
    expert_capacity: int | None = None
    axes: tuple[
        tuple[str, int], ...
    ] = ()  # the expert axis in a mesh of several axes: (("a", 2), ("b", 2)); () is ("expert", R)
    permuted: bool = False  # the mesh takes its devices in another order than jax.devices()

    def __str__(self):
        return self.name

    @property
    def mesh_axes(self):
        return self.axes or (("expert", self.num_ranks),)

    @property
    def axis_name(self):
        names = tuple(name for name, _ in self.mesh_axes)
        return names[0] if len(names) == 1 else names

    @property
    def num_local_experts(self):
        return self.num_experts // self.num_ranks

    @property
    def dispatch_options(self):
        """What it says to jax_ep.dispatch."""
        names = ("axis_name", "num_experts", "layout", "max_recv_tokens", "expert_alignment", "expert_capacity")
        return {name: getattr(self, name) for name in names}


def fitted(case):
    """The case on the ranks there are: on fewer GPUs than it names, with as many experts on each."""
    if os.environ.get("JAX_EP_TEST_PLATFORM") != "gpu" and "JAX_EP_TEST_DEVICES" not in os.environ:
        return case
    import jax

    num_ranks = min(case.num_ranks, len(jax.devices()))
    if num_ranks == case.num_ranks:
        return case
    axes = tuple((axis, num_ranks if i == 0 else 1) for i, (axis, _) in enumerate(case.axes))
    num_experts = case.num_local_experts * num_ranks
    num_topk = min(case.num_topk, num_experts)
    return dataclasses.replace(case, num_ranks=num_ranks, num_experts=num_experts, num_topk=num_topk, axes=axes)


def _model(name, num_experts, num_topk, hidden):
    """Decode: the tokens of one small step. Prefill: what a training step or a long prompt brings to one rank."""
    return [
        Case(f"{name}/{phase}", num_tokens, hidden, num_topk, num_experts, num_ranks=8)
        for phase, num_tokens in (("decode", 128), ("prefill", 4096))
    ]


MODELS = [
    *_model("deepseek-v3", 256, 8, 7168),
    *_model("kimi-k2", 384, 8, 7168),
    *_model("qwen3-235b", 128, 8, 4096),
    *_model("gpt-oss-120b", 128, 4, 2880),
    *_model("mixtral-8x7b", 8, 2, 4096),
]

# Rows of 16 bytes and a few more; every layout, dtype, alignment, number of ranks and kind of capacity at least once.
TINY = [
    Case("expert", 6, 16, 2, 8, 4),
    Case("expert-one-rank", 5, 8, 3, 6, 1),
    Case("expert-three-ranks", 7, 8, 2, 9, 3, dtype="float32"),
    Case("expert-eight-ranks", 4, 24, 4, 16, 8),
    Case("expert-many-choices", 5, 8, 6, 8, 2, dtype="float32"),
    Case("expert-33-choices", 3, 8, 33, 34, 2, dtype="float32"),
    Case("expert-all-experts", 3, 8, 4, 4, 4, dtype="float16"),
    Case("expert-aligned", 6, 8, 2, 8, 4, expert_alignment=8),
    Case("expert-tight", 8, 16, 2, 8, 4, max_recv_tokens=9),
    Case("expert-tight-aligned", 12, 8, 3, 8, 2, max_recv_tokens=37, expert_alignment=16, dtype="float16"),
    Case("expert-one-row", 4, 8, 2, 4, 2, max_recv_tokens=1, expert_alignment=2),
    Case("expert-no-rows", 4, 8, 2, 4, 2, max_recv_tokens=0),
    Case("expert-roomy", 3, 8, 2, 4, 2, max_recv_tokens=101),
    Case("expert-no-tokens", 0, 8, 2, 4, 4),
    Case("expert-two-axes", 5, 8, 3, 8, 4, axes=(("a", 2), ("b", 2))),
    Case("expert-permuted", 5, 8, 3, 8, 4, permuted=True),
    Case("rank", 6, 16, 2, 8, 4, layout="rank"),
    Case("rank-one-rank", 5, 8, 3, 6, 1, layout="rank"),
    Case("rank-three-ranks", 7, 8, 3, 9, 3, layout="rank", dtype="float32"),
    Case("rank-eight-ranks", 4, 8, 6, 16, 8, layout="rank", dtype="float16"),
    Case("rank-tight", 8, 16, 2, 8, 4, layout="rank", max_recv_tokens=7),
    Case("rank-roomy-permuted", 6, 8, 2, 4, 2, layout="rank", max_recv_tokens=40, permuted=True),
    Case("rank-no-tokens", 0, 8, 2, 4, 4, layout="rank"),
    Case("batched", 6, 16, 2, 8, 4, layout="batched"),
    Case("batched-one-rank", 5, 8, 3, 6, 1, layout="batched"),
    Case("batched-three-ranks", 7, 8, 2, 6, 3, layout="batched", dtype="float32"),
    Case("batched-eight-ranks", 4, 8, 2, 8, 8, layout="batched", dtype="float16"),
    Case("batched-tight", 12, 16, 3, 8, 4, layout="batched", expert_capacity=5),
    Case("batched-no-rows", 4, 8, 2, 4, 2, layout="batched", expert_capacity=0),
    Case("batched-roomy-two-axes", 3, 8, 2, 4, 4, layout="batched", expert_capacity=31, axes=(("a", 2), ("b", 2))),
    Case("batched-no-tokens", 0, 8, 2, 4, 4, layout="batched"),
]

CASES = TINY + MODELS
TINY = [fitted(case) for case in TINY]


def case(name, exact=False):
    """The case of that name, on the ranks there are; exactly as it is named for a test that counts on its mesh or sizes."""
    found = next(case for case in CASES if case.name == name)
    return found if exact else fitted(found)
