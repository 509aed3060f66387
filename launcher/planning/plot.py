"""Plots memory against the number of GPUs, one line per strategy, with the device's limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.schema import RunConfig
from launcher.core.distribution import describe_install
from launcher.core.errors import MissingLibraryError, UsageError
from launcher.planning.memory import list_splits, machine_of, planned_precision, zero_settings
from launcher.planning.plan import shard_options
from strategies.comparison import compare_strategies
from strategies.options import ComparisonOptions
from strategies.registry import find_strategy, list_candidates
from strategies.units import format_bytes

if TYPE_CHECKING:
    from launcher.planning.dry_run import DryRun

_SUFFIXES = (".png", ".svg", ".pdf")


def plot_memory(found: DryRun, config: RunConfig, path: Path) -> None:
    """Write the plot.

    Raises:
        MissingLibraryError: matplotlib is not installed.
        UsageError: another suffix, a folder that does not exist, or a module whose memory is not known.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--plot: given {path}; expected a file that ends in {', '.join(_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot: the folder {path.absolute().parent} does not exist; create it first")
    if found.profile is None:
        raise UsageError(
            "--plot: the module could not be created without training, so its memory is not known; omit --plot"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingLibraryError(f"--plot needs matplotlib: {describe_install('plot')}") from error

    counts, lines = memory_by_gpus(found, config)
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, (name, sizes) in enumerate(lines.items()):
        # Offload to NVMe needs as much of the device as offload to the host: one line must not hide the other.
        style = "--" if find_strategy(name).offload == "nvme" else "-"
        # Earlier lines are wider, so that they are visible below others with the same values.
        width = 1.4 + 5 * (len(lines) - 1 - position) / len(lines)
        label = f"{name} (chosen)" if name == found.plan.strategy.name else name
        marker = _MARKERS[position % len(_MARKERS)]
        axes.plot(counts, sizes, style, marker=marker, markersize=4 + width, linewidth=width, label=label)
    memory = found.plan.memory or {}
    limit, whole = memory["limit_bytes"], memory["memory_bytes"]
    axes.axhline(limit, color="black", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"limit {format_bytes(limit)} of {format_bytes(whole)}",
        (counts[-1], limit),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right",
        fontsize=9,
    )
    axes.axvline(found.plan.world_size, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        "this plan",
        (found.plan.world_size, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(4, 4),
        color="grey",
        fontsize=9,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(*rank_ticks(counts))
    axes.minorticks_off()
    axes.set_yticks(*byte_ticks([size for sizes in lines.values() for size in sizes] + [limit]))
    axes.set_xlabel(f"ranks ({', '.join(found.plan.devices)})")
    axes.set_ylabel("memory of one rank at the step's peak")
    batch = found.plan.batch.micro_batch_size
    axes.set_title(
        f"{found.plan.precision}, micro batch {batch or 'of the loader'}, memory {memory['method']}", fontsize=10
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


_MARKERS = "os^vD<>PXpdh*8"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_MOST_TICKS, _MOST_RANK_TICKS = 12, 8


def memory_by_gpus(found: DryRun, config: RunConfig) -> tuple[list[int], dict[str, list[int]]]:
    """Numbers of ranks, and by strategy its bytes on the device for each number."""
    if found.profile is None:
        raise ValueError("memory_by_gpus needs a profile, the dry run has none")
    precision, profile = planned_precision(found.plan), found.profile
    if found.plan.activation_checkpointing and profile.checkpointed is not None:
        profile = profile.checkpointed() or profile
    machine = machine_of(found.agreement, precision)
    last = max(found.plan.world_size * 4, 64)
    counts = [1]
    while counts[-1] < last:
        counts.append(counts[-1] * 2)
    batch = list_splits(config, found.plan)[0]
    lines: dict[str, list[int]] = {candidate.name: [] for candidate in list_candidates()}
    for count in counts:
        ranks = dataclasses.replace(machine, world_size=count, ranks_per_node=min(count, machine.ranks_per_node))
        compared = compare_strategies(
            profile,
            ranks,
            precision,
            [dataclasses.replace(batch, world_size=count)],
            ComparisonOptions(
                config.memory_share,
                zero_settings(machine.device_kind),
                sharding=shard_options(config, checkpoint_activations=found.plan.activation_checkpointing),
            ),
        )
        for assessed in compared.assessments:
            lines[assessed.name].append(assessed.memory.total)
    on_cpu = machine.device_kind == "cpu"
    shown = [c.name for c in list_candidates() if c.needs_process_group and not (on_cpu and c.offload)]
    return counts, {name: lines[name] for name in shown}


def byte_ticks(values: Sequence[int]) -> tuple[list[int], list[str]]:
    """Round sizes over the range of the values, for a logarithmic axis, with labels such as '200 MiB'."""
    low, high = min(values) * 0.6, max(values) * 1.7
    # The last is the coarsest: it remains if there are many units.
    for factors in ((1, 2, 5, 10, 20, 50, 100, 200, 500), (1, 10, 100), (1, 100), (1,)):
        ticks = [(factor * 1024**power, f"{factor} {unit}") for power, unit in enumerate(_UNITS) for factor in factors]
        inside = [tick for tick in ticks if low <= tick[0] <= high]
        if len(inside) <= _MOST_TICKS:
            break
    return [size for size, _ in inside], [label for _, label in inside]


def rank_ticks(counts: Sequence[int]) -> tuple[list[int], list[str]]:
    """Some of the numbers of ranks, so that their labels do not overlap."""
    shown = list(counts[:: math.ceil(len(counts) / _MOST_RANK_TICKS)])
    return shown, [f"{count:,}" for count in shown]
