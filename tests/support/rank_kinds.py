"""Kinds of ranks and spellings of precisions for property tests of the agreement."""

from __future__ import annotations

from hypothesis import strategies as st

from strategies.precision import Precision, RankCapability

NATIVE: dict[str, tuple[frozenset[str], ...]] = {
    # V100; A100 and later.
    "cuda": (frozenset({"fp16", "fp32", "fp64"}), frozenset({"fp16", "bf16", "fp32", "fp64"})),
    "cpu": (frozenset({"fp32", "fp64"}),),
    "mps": (frozenset({"fp32", "fp16"}),),
}
SPELLINGS = {
    Precision.FP16_MIXED: (16, "16", "fp16", "half", "float16", "16_mixed", "16-mixed"),
    Precision.FP16_TRUE: ("16_true", "16-true"),
    Precision.BF16_MIXED: ("bf16", "bfloat16", "bf16_mixed", "bf16-mixed"),
    Precision.BF16_TRUE: ("bf16_true", "bf16-true"),
    Precision.FP32_TRUE: (32, "32", "fp32", "float", "float32", "32_true", "32-true"),
    Precision.FP64_TRUE: (64, "64", "fp64", "double", "float64", "64_true", "64-true"),
}
EVERY_SPELLING = [(text, precision) for precision, texts in SPELLINGS.items() for text in texts]
INVALID = ("17", "fp15", "", None, 8.5, "mixed")


def capability(
    rank: int, kind: str = "cuda", native: str = "fp16 bf16 fp32 fp64", name: str = "H100"
) -> RankCapability:
    return RankCapability(rank, f"node{rank}", kind, name, frozenset(native.split()))  # type: ignore[arg-type]


def v100(rank: int) -> RankCapability:
    return capability(rank, native="fp16 fp32 fp64", name="Tesla V100")


def cpu(rank: int) -> RankCapability:
    return capability(rank, "cpu", "fp32 fp64", "EPYC")


@st.composite
def capabilities(draw: st.DrawFn, kinds: tuple[str, ...] = ("cuda", "cpu", "mps")) -> list[RankCapability]:
    made: list[RankCapability] = []
    for rank in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(kinds))
        native = draw(st.sampled_from(NATIVE[kind]))
        made.append(RankCapability(rank, f"node{rank // 2}", kind, f"{kind} device", native))  # type: ignore[arg-type]
    return made


def computes(rank: RankCapability, precision: Precision) -> bool:
    """Whether the rank's device supports the precision in hardware, and Lightning has an autocast for it."""
    dtype = {"16": "fp16", "bf16": "bf16", "32": "fp32", "64": "fp64"}[precision.split("-")[0]]
    return dtype in rank.native_dtypes and not (precision.endswith("mixed") and rank.device_kind == "mps")
