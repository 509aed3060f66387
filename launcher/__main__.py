"""`python -m launcher` and the console script `launcher`."""

import sys

from launcher.cli.main import run
from launcher.process.standard_streams import open_missing_streams
from launcher.process.titles import claim_process


def main() -> int:
    """Run the command line; returns the exit code."""
    # Before anything is opened, which would get the number of a closed one.
    open_missing_streams()
    claim_process()
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
