"""Random kernels, policies and calls for Hypothesis: few values, close to each other, so that thresholds are met."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from layerzero_runtime.context import DTYPES, SelectionContext
from layerzero_runtime.kernel import KernelSpec
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Kind, Limit
from tests.runtime.selection_oracle import TOO_NEW
from tests.scenarios.conftest import GAUDI, GRAVITON, H100, OLD_PC, T4, XEON

ABSENT = "absent"  # a probe that always fails
SIZES = (1, 2, 63, 64, 65, 96, 128)
ATTENTION = ("attention.causal", "attention.full", "attention.cross")
NORMS, GATES = ("norm.rms", "norm.layer"), ("mlp.swiglu",)
FAMILIES = (ATTENTION, NORMS, GATES)  # no kernel computes operations of two of them
_SOME_DTYPES = ("float16", "bfloat16", "float32")
_SIZE = st.sampled_from(SIZES)

# One permissive kernel; a random one has a few of these changes.
_CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "platforms": st.sampled_from([("cuda",), ("cpu",), ("cpu", "hpu")]),
    "dtypes": st.sampled_from([("float16",), ("float32", "bfloat16")]),
    "min_sm": st.sampled_from([(7, 5), (8, 0), (9, 0), (10, 0)]),
    "max_sm": st.sampled_from([(7, 5), (8, 9), (9, 0)]),
    "instruction_sets": st.sampled_from([("avx512_bf16",), ("sve_bf16", "sse")]),
    "layouts": st.sampled_from([("bhsd",), ("bshd",), ("nhd",), ("nhd", "bshd")]),
    "min_head_dim": _SIZE,
    "max_head_dim": _SIZE,
    "head_dim_multiple": st.sampled_from([2, 32, 64]),
    "min_seq_len": _SIZE,
    "max_seq_len": _SIZE,
    "max_batch_size": st.sampled_from([1, 2]),
    "max_score_elements": st.sampled_from([4 * 64 * 64, 8 * 65 * 65]),
    "max_hidden_size": _SIZE,
    "hidden_size_multiple": st.sampled_from([2, 32]),
    "supports_gqa": st.just(False),
    "supports_attn_mask": st.just(False),
    "supports_dropout": st.just(False),
    "supports_scale": st.just(False),
    "supports_offset": st.just(False),
    "supports_mixed_weight_dtype": st.just(False),
    "supports_v_head_dim": st.just(False),
    "causal_geometries": st.sampled_from([("square",), ("top_left",), ("square", "bottom_right")]),
    "quant_formats": st.sampled_from([("int8",), (None, "int8"), ("fp8",)]),
    "produces_dtype": st.sampled_from(["float32", "bfloat16"]),
    "workspace_bytes": st.sampled_from([100, 101]),
    "is_cuda_graph_safe": st.just(False),
    "transform_cost_hint": st.sampled_from([0.0, 1.0, 30.0]),
    "deterministic": st.just(False),
    "compiles": st.just(True),
    "supports_backward": st.just(False),
}
_PERMISSIVE: dict[str, Any] = {
    "platforms": ("cuda", "cpu", "hpu"),
    "dtypes": DTYPES,
    "layouts": ("bhsd", "bshd", "nhd"),
    "supports_gqa": True,
    "supports_attn_mask": True,
    "supports_dropout": True,
    "supports_mixed_weight_dtype": True,
    "supports_v_head_dim": True,
    "causal_geometries": ("square", "top_left", "bottom_right"),
    "quant_formats": (None, "int8", "fp8"),
    "supports_backward": True,
}


def _limit(kinds: Kind | list[Kind], bounds: list[Any], *fields: str) -> st.SearchStrategy[Limit]:
    several = kinds if isinstance(kinds, list) else [kinds]
    return st.builds(Limit, st.sampled_from(fields), st.sampled_from(several), st.sampled_from(bounds))


def limits() -> st.SearchStrategy[Limit]:
    """Conditions on one field, as a rule or `extra_limits` may have them."""
    sizes = ("seq_len_q", "seq_len_k", "head_dim", "batch_size", "rows", "hidden_size", "gqa_group")
    bounds: list[Kind] = ["at_least", "at_most"]
    return st.one_of(
        _limit(bounds, [*SIZES], *sizes),
        _limit("multiple_of", [2, 3, 32], *sizes),
        _limit("one_of", [(1,), (2, 64), (63, 65, None), (None,)], *sizes),
        _limit(bounds, [4 * 64 * 64, 8 * 65 * 65], "score_elements"),
        _limit(bounds, [(7, 5), (8, 0), (9, 0)], "sm"),
        _limit(bounds, [0.0, 0.1, 0.5], "dropout_p"),
        _limit("one_of", [("float16",), ("bfloat16", "float32")], "dtype"),
        _limit("one_of", [(True,), (False,)], "requires_grad", "is_causal", "is_contiguous", "scale_is_usual"),
        _limit("one_of", [("bhsd",), ("bshd", "nhd")], "layout"),
        _limit("one_of", [(None,), ("square", "top_left")], "causal_mask"),
        _limit("one_of", [("cuda",), ("cpu", "hpu")], "platform"),
    )


@st.composite
def specs(draw: st.DrawFn, family: tuple[str, ...], largest: int = 5) -> list[KernelSpec]:
    """Some kernels of one family of operations, with distinct ids."""
    found = []
    for number in range(draw(st.integers(0, largest))):
        library = draw(st.sampled_from(["alpha", "beta", "torch"]))
        names = draw(st.lists(st.sampled_from(sorted(_CHANGES)), max_size=4, unique=True))
        changes = {name: draw(_CHANGES[name]) for name in names}
        for low, high in (("min_sm", "max_sm"), ("min_head_dim", "max_head_dim"), ("min_seq_len", "max_seq_len")):
            if low in changes and high in changes:
                changes[low], changes[high] = sorted((changes[low], changes[high]))
        computes = draw(st.just(family) | st.lists(st.sampled_from(family), min_size=1, unique=True).map(tuple))
        found.append(
            KernelSpec(
                kernel_id=f"{library}.k{number}",
                library=library,
                operations=computes,
                requires=draw(st.sampled_from([(), (), (ABSENT,)])),
                min_version=draw(st.sampled_from(["", "", "", TOO_NEW])),
                requires_contiguous=draw(st.sampled_from([False, True])),
                requires_last_dim_stride1=draw(st.sampled_from([False, False, True])),
                priority=draw(st.sampled_from([10, 50, 51, 60])),
                extra_limits=tuple(draw(st.lists(limits(), max_size=1))),
                **(_PERMISSIVE | changes),
            )
        )
    return found


def rules(kernels: tuple[str, ...], boost: st.SearchStrategy[float]) -> st.SearchStrategy[Rule]:
    return st.builds(
        Rule,
        operation=st.sampled_from([*["*"] * 5, "attention.*", "*.causal", "norm.rms", "mlp.*", "gone"]),
        kernel=st.sampled_from(kernels),
        backend=st.sampled_from(["*", "*", "*", "alpha", "[bt]*"]),
        when=st.just(()) | st.lists(limits(), max_size=2).map(tuple),
        boost=boost,
    )


def policies(*kernels: str) -> st.SearchStrategy[Policy]:
    """Policies whose rules name kernels by these globs."""
    globs = kernels or ("*", "*.k1", "alpha.*", "torch.k[02]", "*.k?", "gone.*", "*.k3")
    plain = st.lists(rules(globs, st.just(0.0)), max_size=2).map(tuple)
    boosts = st.lists(rules(globs, st.sampled_from([-3.0, 0.5, 1.0, 1.5])), max_size=3).map(tuple)
    # Mostly one or two kinds of rules at a time: what all kinds leave is often nothing.
    none: st.SearchStrategy[tuple[Rule, ...]] = st.just(())
    return st.builds(Policy, locks=none | plain, allows=none | plain, denies=none | plain, boosts=none | boosts)


@st.composite
def contexts(draw: st.DrawFn, family: tuple[str, ...]) -> SelectionContext:
    """Calls of a family on described devices, most of them with a feature or two beyond the plain ones."""
    operation = draw(st.sampled_from(family))
    rare: dict[str, st.SearchStrategy[Any]] = {
        "mode": st.just("graph"),
        "output_dtype": st.sampled_from(_SOME_DTYPES),
        "quant_format": st.sampled_from(["int8", "fp8"]),
        "requires_grad": st.just(True),
        "requires_deterministic": st.just(True),
        "workspace_limit": st.sampled_from([0, 100]),
    }
    if family != ATTENTION:
        fields: dict[str, Any] = {"rows": draw(_SIZE), "hidden_size": draw(_SIZE)}
        rare |= {"weight_dtype": st.sampled_from(_SOME_DTYPES), "offset": st.just(1.0)}
    else:
        length = draw(_SIZE)
        other = length if operation == "attention.full" else draw(_SIZE)
        fields = {
            "batch_size": draw(st.sampled_from([1, 2, 3])),
            "seq_len_q": length,
            "seq_len_k": length + 1 if operation == "attention.cross" and other == length else other,
            "num_heads": 4,
            "num_kv_heads": draw(st.sampled_from([4, 4, 2])),
            "head_dim": draw(_SIZE),
        }
        rare |= {
            "v_head_dim": _SIZE,
            "layout": st.sampled_from(["bshd", "nhd"]),
            "attn_mask": st.sampled_from(["bool", "float"]),
            "dropout_p": st.sampled_from([0.1, 0.5]),
            "scale": st.just(0.3),
            "causal_alignment": st.just("bottom_right"),
        }
    names = draw(st.lists(st.sampled_from(sorted(rare)), max_size=2, unique=True))
    return SelectionContext(
        operation=operation,
        dtype=draw(st.sampled_from(_SOME_DTYPES)),
        is_contiguous=draw(st.sampled_from([True, True, False])),
        stride_last_dim=draw(st.sampled_from([1, 1, 2])),
        device=draw(st.sampled_from([H100, H100, T4, XEON, GRAVITON, OLD_PC, GAUDI])),
        **fields,
        **{name: draw(rare[name]) for name in names},
    )
