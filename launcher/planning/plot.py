"""Plots memory against the number of GPUs, one line per strategy, with the device's limit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.schema import RunConfig
from launcher.core.distribution import describe_install
from launcher.core.errors import MissingLibraryError, UsageError
from launcher.planning.memory import list_splits, machine_of, planned_precision, zero_settings
from strategies.comparison import ComparisonOptions, compare_strategies
from strategies.registry import find_strategy, list_candidates
from strategies.units import GIB, format_bytes

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
        sizes_gib = [size / GIB for size in sizes]
        axes.plot(
            counts, sizes_gib, style, marker=_MARKERS[position % len(_MARKERS)], markersize=5, linewidth=1.6, label=name
        )
    memory = found.plan.memory or {}
    limit, whole = memory["limit_bytes"], memory["memory_bytes"]
    axes.axhline(limit / GIB, color="black", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"limit {format_bytes(limit)} of {format_bytes(whole)}",
        (counts[-1], limit / GIB),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right",
        fontsize=9,
    )
    axes.axvline(found.plan.world_size, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_yticks(*_ticks([size / GIB for sizes in lines.values() for size in sizes] + [limit / GIB]))
    axes.set_xlabel(f"ranks ({', '.join(found.plan.devices)})")
    axes.set_ylabel("memory of one rank at the step's peak, GiB")
    batch = found.plan.batch.micro_batch_size
    axes.set_title(
        f"{found.plan.precision}, micro batch {batch or 'of the loader'}, memory {memory['method']}", fontsize=10
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


_MARKERS = "os^vD<>P"


def memory_by_gpus(found: DryRun, config: RunConfig) -> tuple[list[int], dict[str, list[int]]]:
    """Numbers of ranks, and by strategy its bytes on the device for each number."""
    if found.profile is None:
        raise ValueError("memory_by_gpus needs a profile, the dry run has none")
    precision = planned_precision(found.plan)
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
            found.profile,
            ranks,
            precision,
            [dataclasses.replace(batch, world_size=count)],
            ComparisonOptions(config.memory_share, zero_settings(machine.device_kind)),
        )
        for assessed in compared.assessments:
            lines[assessed.name].append(assessed.memory.total)
    on_cpu = machine.device_kind == "cpu"
    shown = [c.name for c in list_candidates() if c.needs_process_group and not (on_cpu and c.offload)]
    return counts, {name: lines[name] for name in shown}


def _ticks(values: list[float]) -> tuple[list[float], list[str]]:
    """Ticks at 1, 2 and 5 times powers of ten over the range of the values, with labels."""
    low, high = min(values), max(values)
    steps = [factor * 10.0**power for power in range(-9, 7) for factor in (1, 2, 5)]
    inside = [step for step in steps if low * 0.6 <= step <= high * 1.7]
    return inside, [f"{step:g}" for step in inside]
