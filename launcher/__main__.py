"""`python -m launcher` and the console script `launcher`."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        # Inside: Ctrl-C may come during the imports.
        from launcher.process.standard_streams import open_missing_streams
        from launcher.process.titles import claim_process

        # Before anything is opened, which would get the number of a closed one.
        open_missing_streams()
        claim_process()
        from launcher.cli.main import run
    except KeyboardInterrupt:
        return 130
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
