"""`launcher convert CKPT OUT`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.parsers import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = new_parser("convert")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a file, or DeepSpeed's folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write; torch.load(OUT) reads it")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Convert a checkpoint; returns the exit code."""
    options = build_parser().parse_args(arguments)
    # Only files are read: DeepSpeed does not need a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from launcher.training.resume.convert import convert_checkpoint

    count = convert_checkpoint(options.checkpoint, options.out)
    sys.stdout.write(f"{options.out}: {count} tensors\n")
    return 0
