"""The `fxray` command: a demo, your own models, and what a run holds, as text and pictures."""

from fxray.cli.entry import main

__all__ = ["main"]
