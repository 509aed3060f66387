"""The pictures of the documentation, made from a real run and a real plan.

    python -m launcher fit --nproc-per-node 2 --precision 16-mixed --trainer.max_steps 60 --name picture
    python -m docs.generate.pictures runs/picture

writes plan.svg and report.png to docs/images; needs Chromium and the test dependencies. Without a run it writes only
plan.svg.
"""

from __future__ import annotations

import base64
import re
import socket
import sys
import tempfile
from io import BytesIO, StringIO
from pathlib import Path

from PIL import Image
from rich.console import Console

from docs.generate.cli import find_parser
from launcher.config.loading import load_config
from launcher.hardware.target_machines import read_options
from launcher.planning.dry_run import plan_here
from launcher.planning.table import print_memory, print_plan
from launcher.report.command import write_report
from launcher.report.source import find_run_directory, read_run
from tests.support.browser import browser

IMAGES = Path(__file__).resolve().parents[1] / "images"
# The part of the page with the figures, the loss and the first plots of the ranks.
_WIDTH, _HEIGHT = 1000, 1500


def main() -> None:
    """Draw the plan, and the report of a run that is given."""
    draw_plan()
    if sys.argv[1:]:
        draw_report(sys.argv[1])


def draw_plan() -> None:
    """Draw plan.svg."""
    console = Console(record=True, width=128, file=StringIO())
    arguments = ["--gpus", "8", "--gpu", "h100"]
    machine = read_options(find_parser("plan").parse_args(arguments))
    found = plan_here(load_config([], []), socket.gethostname(), machine)
    print_plan(found.plan, console)
    print_memory(found.plan, console)
    drawn = console.export_svg(title=f"launcher plan {' '.join(arguments)}")
    # No font is loaded from elsewhere; the reader's own monospace font is used.
    (IMAGES / "plan.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))


def draw_report(run: str) -> None:
    """Draw report.png."""
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "report.html"
        write_report([read_run(find_run_directory(run, Path("runs")))], page_file)
        with browser(Path(folder) / "profile") as page:
            page.open(page_file)
            page.show_as("light", width=_WIDTH)
            clip = {"x": 0, "y": 0, "width": _WIDTH, "height": _HEIGHT, "scale": 1}
            shot = page.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    picture = Image.open(BytesIO(base64.b64decode(shot["data"])))
    picture.convert("RGB").quantize(64).save(IMAGES / "report.png", optimize=True)


if __name__ == "__main__":
    main()
