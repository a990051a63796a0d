"""The command `scorer` as a script of the checkout: `python cli.py score ...`."""

from scorer.__main__ import main

if __name__ == "__main__":
    main()
