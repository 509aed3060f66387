"""Choose the strategy, with the reasons and the candidates that were not taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from strategies.deepspeed_config import VARIANTS

SINGLE_DEVICE = "single_device"
DDP = "ddp"
# Lightning's spelling for a DDP that looks for unused parameters in every step.
DDP_FIND_UNUSED = "ddp_find_unused_parameters_true"
AUTO = "auto"
# Of Lightning's DDPStrategy, and those of DistributedDataParallel that it hands on. The plan decides the rest.
DDP_OPTIONS = (
    "ddp_comm_state",
    "ddp_comm_hook",
    "ddp_comm_wrapper",
    "model_averaging_period",
    "bucket_cap_mb",
    "broadcast_buffers",
    "gradient_as_bucket_view",
    "init_sync",
    "skip_all_reduce_unused_params",
)
# Names of parameters that a message shows.
_SHOWN = 8
NAMES = (AUTO, SINGLE_DEVICE, DDP, DDP_FIND_UNUSED, *VARIANTS)


class StrategyError(ValueError):
    """A strategy that does not exist or does not fit the number of ranks."""


class UnusedParametersError(StrategyError):
    """DDP met parameters without a gradient.

    Attributes:
        names: of the parameters, as in `named_parameters()`.
    """

    def __init__(self, names: Sequence[str], where: str) -> None:
        many = len(names) != 1
        super().__init__(
            f"{listed(names)} got no gradient in {where}, and DDP would go on with gradients that are not summed over "
            f"the ranks; set `strategy: {DDP_FIND_UNUSED}`, or freeze {'them' if many else 'it'} with "
            "requires_grad_(False)"
        )
        self.names = tuple(names)


def listed(names: Sequence[str]) -> str:
    """The parameters in words: all names of a few, the first of many."""
    if not names:
        return "some parameters"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"parameter{'' if len(names) == 1 else 's'} {', '.join(names[:_SHOWN])}{more}"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that was not taken, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """What trains the model.

    Attributes:
        name: `single_device`, `ddp`, or one of DeepSpeed's variants as Lightning spells them.
        reasons: in plain words, for the plan.
        rejected: the other candidates.
        backend: process group backend, None without a process group.
        gradient_as_bucket_view: gradients are views into DDP's buckets, which saves one copy of all gradients.
        static_graph: DDP may take the first step's graph for all steps.
        find_unused_parameters: DDP looks in every step for parameters that got no gradient.
    """

    name: str
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...] = field(default=())
    backend: str | None = None
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    find_unused_parameters: bool = False


def choose_strategy(
    requested: str, *, world_size: int, device_kind: str, accumulate: int, model_has_static_graph: bool
) -> StrategyChoice:
    """Pick the strategy for `world_size` ranks.

    Args:
        requested: one of `NAMES`.
        world_size: number of ranks.
        device_kind: 'cpu', 'cuda' or 'mps'.
        accumulate: micro batches per optimizer step.
        model_has_static_graph: whether the model declares `static_graph = True`: every step uses the same parameters.

    Raises:
        StrategyError: unknown name, or a strategy that these ranks cannot run.
    """
    if requested not in NAMES:
        raise StrategyError(f"strategy {requested!r} does not exist; valid are {', '.join(NAMES)}")
    if requested == SINGLE_DEVICE and world_size > 1:
        raise StrategyError(
            f"strategy single_device was asked for, but there are {world_size} ranks; use `strategy: auto`, or one rank"
        )
    if device_kind == "mps" and (world_size > 1 or requested not in (AUTO, SINGLE_DEVICE)):
        raise StrategyError("Apple's GPU has no process group backend; use `devices: 1` or `accelerator: cpu`")
    if requested == SINGLE_DEVICE or (requested == AUTO and world_size == 1):
        why = "one rank: there is nobody to exchange gradients with"
        return StrategyChoice(
            SINGLE_DEVICE, (why,), (Rejected(DDP, "with one rank it only adds the cost of its buckets"),)
        )
    if requested in VARIANTS:
        return _deepspeed(requested, world_size, device_kind)
    return _ddp(requested, world_size, device_kind, accumulate, model_has_static_graph)


def with_user_options(choice: StrategyChoice, options: Mapping[str, Any]) -> StrategyChoice:
    """The same choice with what the user said of DDP; only what the plan itself knows of is changed.

    Args:
        choice: of `choose_strategy`.
        options: the user's own arguments of Lightning's DDPStrategy.
    """
    if choice.name != DDP or not options:
        return choice
    views = bool(options.get("gradient_as_bucket_view", choice.gradient_as_bucket_view))
    reasons = [reason for reason in choice.reasons if views or not reason.startswith("gradient_as_bucket_view")]
    reasons.append(f"own options of DDP: {', '.join(options)}")
    return replace(choice, gradient_as_bucket_view=views, reasons=tuple(reasons))


def _ddp(requested: str, world_size: int, device_kind: str, accumulate: int, declared_static: bool) -> StrategyChoice:
    backend = "nccl" if device_kind == "cuda" else "gloo"
    find_unused = requested == DDP_FIND_UNUSED
    static, why_static = _static_graph(find_unused, accumulate, declared_static)
    asked = "asked for" if requested != AUTO else f"{world_size} ranks, each with the whole model"
    reasons = (
        f"DDP: {asked}",
        f"{backend} carries the gradients of {device_kind} devices",
        "gradient_as_bucket_view: saves a copy of all gradients",
        why_static,
    )
    return StrategyChoice(
        DDP,
        reasons,
        (Rejected(SINGLE_DEVICE, f"there are {world_size} ranks"),) if world_size > 1 else (),
        backend=backend,
        gradient_as_bucket_view=True,
        static_graph=static,
        find_unused_parameters=find_unused,
    )


def _deepspeed(requested: str, world_size: int, device_kind: str) -> StrategyChoice:
    """A variant that was asked for by name."""
    variant = VARIANTS[requested]
    if world_size == 1 and not variant.offloads:
        raise StrategyError(
            f"strategy {requested} shares the model's states among ranks, but there is one rank; start several "
            "(`devices: 2`, or torchrun), or use `strategy: auto`"
        )
    backend = "nccl" if device_kind == "cuda" else "gloo"
    shared = ("the optimizer's states", "the gradients", "the parameters")[: variant.stage]
    reasons = [
        f"{requested}: asked for",
        f"ZeRO stage {variant.stage}: each rank keeps 1/{world_size} of " + ", ".join(shared),
    ]
    if variant.offload_optimizer is not None:
        reasons.append(f"optimizer states lie on {variant.offload_optimizer}")
    if variant.offload_parameters is not None:
        reasons.append(f"parameters lie on {variant.offload_parameters}")
    reasons.append(f"{backend} carries gradients and parameters of {device_kind} devices")
    if device_kind == "cpu":
        reasons.append("DeepSpeed on CPUs is for debugging: it is slower than DDP and saves no memory that matters")
    rejected = (Rejected(SINGLE_DEVICE, f"there are {world_size} ranks"),) if world_size > 1 else ()
    return StrategyChoice(requested, tuple(reasons), rejected, backend=backend)


def _static_graph(find_unused: bool, accumulate: int, declared: bool) -> tuple[bool, str]:
    """Safe only if each step uses the same parameters and each backward is followed by an all-reduce."""
    if find_unused:
        return False, "static_graph off: unused parameters may change from step to step"
    if not declared:
        return False, "static_graph off: the model does not declare `static_graph = True`"
    if accumulate > 1:
        return False, f"static_graph off: {accumulate - 1} of {accumulate} backward passes skip the all-reduce"
    return True, "static_graph on: the model declares that every step uses the same parameters"
