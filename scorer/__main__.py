"""The command `scorer`, also as `python -m scorer`. Imports little at its top, so that Ctrl-C ends it quietly."""

import os
import sys

TRAINING = ("lp", "validate")  # commands


def main() -> None:
    """The console command `scorer`."""
    if sys.argv[1:2] and sys.argv[1] in TRAINING:
        # Threads that wait for each other sleep, instead of spinning: where other processes share the cores, training
        # takes a quarter of the time. Alone it loses a seventh of its speed, and vLLM would lose half. Read when torch
        # is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from scorer.commands import main as run_command

        run_command()
    except KeyboardInterrupt:  # before it could be caught there
        sys.exit(130)


if __name__ == "__main__":
    main()
