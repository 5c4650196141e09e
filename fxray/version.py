"""Which fxray this is."""

from importlib import metadata

__all__ = ["VERSION"]


def _installed() -> str:
    try:
        return metadata.version("fxray")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"


VERSION = _installed()
