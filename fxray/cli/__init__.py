"""The `fxray` command: a demo, and what a run holds, as text and as pictures."""

from fxray.cli.entry import main

__all__ = ["main"]
