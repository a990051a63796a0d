"""The command `scorer`, also as `python -m scorer`. Imports little at its top, so that Ctrl-C ends it quietly."""

import os
import sys

# Threads that wait for each other sleep. Where other processes share the cores, as they wait by default takes training
# four times as long. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """The console command `scorer`."""
    try:
        from scorer.commands import main as run_command

        run_command()
    except KeyboardInterrupt:  # before it could be caught there
        sys.exit(130)


if __name__ == "__main__":
    main()
