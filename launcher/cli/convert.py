"""`launcher convert CKPT OUT`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.parsers import new_parser

_FORMATS = {
    "weights": "a state dict; torch.load(OUT) reads it",
    "safetensors": "the weights for other libraries; the default if OUT ends with .safetensors",
    "lightning": "the file that Lightning saves on one device, with the states of the optimizers",
    "sharded": "a folder that FSDP2 reads in parts",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = new_parser("convert")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a file, or a folder of FSDP2 or DeepSpeed")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file or folder to write")
    listed = "; ".join(f"{name}: {text}" for name, text in _FORMATS.items())
    parser.add_argument("--format", choices=[*_FORMATS], help=f"what to write (default: weights). {listed}")
    parser.add_argument("--resume-trust", action="store_true", help="the checkpoint may run code while it is loaded")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Convert a checkpoint; returns the exit code."""
    options = build_parser().parse_args(arguments)
    # Only files are read: DeepSpeed does not need a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from launcher.training.resume.convert import convert_checkpoint

    kind = options.format or ("safetensors" if options.out.suffix == ".safetensors" else "weights")
    count = convert_checkpoint(options.checkpoint, options.out, kind, trusted=options.resume_trust)
    sys.stdout.write(f"{options.out}: {count} tensors\n")
    return 0
