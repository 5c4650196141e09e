"""Who looks at the ops of a model while it runs as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["Visitor"]


class Visitor(Protocol):
    """Who looks at the ops of interposed forwards."""

    @property
    def wants(self) -> Collection[str]:
        """Paths of the ops whose output is handed over."""
        ...

    @property
    def wants_input(self) -> Collection[str]:
        """Paths of the ops whose arguments are handed over."""
        ...

    def begin(self, *, training: bool) -> bool:
        """Count a forward that begins; return whether to look into it at all."""
        ...

    def before(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at what the op at `path` is given."""
        ...

    def after(self, path: str, out: Any) -> None:
        """Look at what the op at `path` gave."""
        ...

    def finish(self) -> None:
        """Note that the forward begun last has returned, or was ended by an exception."""
        ...
