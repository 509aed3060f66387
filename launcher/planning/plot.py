"""Draws memory against the number of GPUs, one line a strategy, with the device's limit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.schema import RunConfig
from launcher.core.errors import MissingLibraryError, UsageError
from launcher.planning.memory import machine_of, planned_precision, splits, zero_settings
from strategies.candidates import CANDIDATES, ZERO_3_NVME
from strategies.comparison import compare_strategies
from strategies.units import GIB, format_bytes

if TYPE_CHECKING:
    from launcher.planning.dry_run import DryRun

_SUFFIXES = (".png", ".svg", ".pdf")


def plot_memory(found: DryRun, config: RunConfig, path: Path) -> None:
    """Write the picture.

    Args:
        found: the plan; its micro batch is kept for every number of GPUs.
        config: for the memory share.
        path: a file that ends in .png, .svg or .pdf.

    Raises:
        MissingLibraryError: matplotlib is not installed.
        UsageError: another ending, a folder that does not exist, or a module whose memory is not known.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--plot: given {path}; expected a file that ends in {', '.join(_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot: the folder {path.absolute().parent} does not exist; make it first")
    if found.profile is None:
        raise UsageError(
            "--plot: the module could not be made without training it, so its memory is not known; leave out --plot"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingLibraryError('--plot needs matplotlib: pip install "launcher[plot]"') from error

    counts, lines = memory_by_gpus(found, config)
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, (name, sizes) in enumerate(lines.items()):
        # NVMe takes the same of the device as host memory does: one line must not hide the other.
        style = "--" if name == ZERO_3_NVME.name else "-"
        sizes_gib = [size / GIB for size in sizes]
        axes.plot(counts, sizes_gib, style, marker=_MARKERS[position], markersize=5, linewidth=1.6, label=name)
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
    """Numbers of ranks, and for each strategy its bytes on the device: those that these ranks can run."""
    if found.profile is None:
        raise ValueError("memory_by_gpus needs a profile, the dry run has none")
    precision = planned_precision(found.plan)
    machine = machine_of(found.agreement, precision)
    last = max(found.plan.world_size * 4, 64)
    counts = [1]
    while counts[-1] < last:
        counts.append(counts[-1] * 2)
    batch = splits(config, found.plan)[0]
    lines: dict[str, list[int]] = {candidate.name: [] for candidate in CANDIDATES}
    for count in counts:
        ranks = dataclasses.replace(machine, world_size=count, ranks_per_node=min(count, machine.ranks_per_node))
        compared = compare_strategies(
            found.profile,
            ranks,
            precision,
            [dataclasses.replace(batch, world_size=count)],
            memory_share=config.memory_share,
            settings=zero_settings(machine.device_kind),
        )
        for assessed in compared.assessments:
            lines[assessed.name].append(assessed.memory.total)
    hidden = {"single_device"} | ({c.name for c in CANDIDATES if c.offload} if machine.device_kind == "cpu" else set())
    return counts, {name: sizes for name, sizes in lines.items() if name not in hidden}


def _ticks(values: list[float]) -> tuple[list[float], list[str]]:
    """1, 2, 5 steps over the range of the values, in plain numbers."""
    low, high = min(values), max(values)
    steps = [factor * 10.0**power for power in range(-9, 7) for factor in (1, 2, 5)]
    inside = [step for step in steps if low * 0.6 <= step <= high * 1.7]
    return inside, [f"{step:g}" for step in inside]
