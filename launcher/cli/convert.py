"""`launcher convert`: the words of the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def run(words: Sequence[str]) -> int:
    """Run `launcher convert CKPT OUT`.

    Returns:
        0; what cannot be converted is raised as a `UsageError`.
    """
    parser = argparse.ArgumentParser(
        "launcher convert",
        description="Write a checkpoint of any strategy as one plain state dict.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="file or DeepSpeed's folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write; torch.load(OUT) reads it")
    options = parser.parse_args(words)
    # Only files are read: DeepSpeed need not look for a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from launcher.training.resume.convert import convert_checkpoint

    count = convert_checkpoint(options.checkpoint, options.out)
    sys.stdout.write(f"{options.out}: {count} tensors\n")
    return 0
