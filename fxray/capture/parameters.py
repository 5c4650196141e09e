"""The parameters of ops that are captured, and the gradients that optimizers used of them."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fxray.capture.interpose import Net
    from fxray.capture.spots import Site

__all__ = ["Awaited", "parameters"]


def parameters(net: Net, site: Site) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, parameter) of the op of a site as the module holds them now.

    Looked up each time: `functional_call` and the like put others in their place.
    """
    for name in site.op.parameters:
        parameter = _parameter(net, site, name)
        if parameter is not None:
            yield name, parameter


def _parameter(net: Net, site: Site, name: str) -> torch.Tensor | None:
    path = site.op.parameter_path(name)
    found: torch.Tensor | None
    try:
        found = operator.attrgetter(path)(net.original)
    except AttributeError:
        path, _, last = path.rpartition(".")
        found = getattr(net.original.get_submodule(path), last, None)
    return found


class Awaited:
    """The gradients that were due and wait for the next optimizer that uses them."""

    def __init__(self) -> None:
        self._sites: dict[tuple[tuple[str, str], str], tuple[Site, int]] = {}
        self._taken: dict[tuple[tuple[str, str], str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._sites)

    def add(self, site: Site, step: int) -> None:
        """Await the gradients of every parameter of a site's op, due at `step`."""
        for name in site.op.parameters:
            self._sites[site.key, name] = site, step

    def used(
        self, net: Net, optimizer: torch.optim.Optimizer, step: int
    ) -> Iterator[tuple[Site, str, torch.Tensor]]:
        """Yield (site, parameter's name, gradient) of what an optimizer has just used.

        Parameter by parameter: weights and biases may have optimizers of their own.

        Args:
            net: the module.
            optimizer: it has stepped.
            step: in which it did.
        """
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for (key, name), (site, due) in [*self._sites.items()]:
            if due != step and self._taken.get((key, name)) == due:
                # A step of several forwards, of which one came after the optimizer: its
                # gradient is another's (of a GAN's discriminator, the generator's loss).
                del self._sites[key, name]
                continue
            p = _parameter(net, site, name)
            if p is not None and id(p) in owned and p.grad is not None:
                del self._sites[key, name]
                self._taken[key, name] = due
                yield site, name, p.grad
