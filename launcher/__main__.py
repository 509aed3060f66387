"""`python -m launcher` and the console script `launcher`."""

import sys

from launcher.cli import run


def main() -> int:
    """Run the command line; returns the exit code."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
