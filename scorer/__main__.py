"""`python -m scorer` is the command `scorer`."""

from scorer.commands import main

if __name__ == "__main__":
    main()
