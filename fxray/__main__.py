"""Lets `python -m fxray` do what `fxray` does."""

import sys

from fxray.cli import main

if __name__ == "__main__":
    sys.exit(main())
