"""The command `scorer`, also as `python -m scorer`. Imports nothing at its top, so that Ctrl-C ends it quietly."""

import sys


def main() -> None:
    """The console command `scorer`."""
    try:
        from scorer.commands import main as run_command

        run_command()
    except KeyboardInterrupt:  # before it could be caught there
        sys.exit(130)


if __name__ == "__main__":
    main()
