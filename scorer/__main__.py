"""The command `scorer`, also as `python -m scorer`. Imports little at its top, so that Ctrl-C ends it quietly."""

import gc
import os
import sys

# Python looks for garbage each time that this many more objects were made than freed. By default, after 700, that takes
# a sixth of the time to import torch and transformers, which make half a million to keep.
GC_THRESHOLD = 50_000
TRAINING = ("lp", "validate")  # commands


def main() -> None:
    """The console command `scorer`."""
    gc.set_threshold(GC_THRESHOLD)
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
    finally:
        gc.freeze()  # Python does not look for garbage in what is loaded as it exits, which takes a second


if __name__ == "__main__":
    main()
