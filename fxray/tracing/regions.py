"""Checkpointed regions: the marks around one in a graph, and the call that runs one.

A graph that is written stays flat, so that the ops of a region have nodes, names and
captures like all others; two marks say where it begins and ends. The code that runs
(`codegen.py`) has the ops between them in a function of their own, which is called
through `torch.utils.checkpoint` as the model does: what they save for backward is
not kept, but computed again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "Recomputed",
    "begin_checkpoint",
    "checkpointed",
    "count_regions",
    "end_checkpoint",
    "recomputed_later",
]


def begin_checkpoint(  # noqa: D417 - the rest are torch.utils.checkpoint's own
    inputs: tuple[Any, ...],
    *,
    use_reentrant: bool,
    preserve_rng_state: bool = True,
    **settings: Any,
) -> None:
    """Mark where a checkpointed region begins; does nothing by itself.

    Args:
        inputs: the tensors that the model gave the region as arguments, in their order.
            Through others that it uses, a reentrant one passes no gradient.
    """


def end_checkpoint(begun: None, outputs: tuple[Any, ...] = ()) -> None:
    """Mark where the region ends that `begun` began; does nothing by itself.

    Args:
        begun: the beginning.
        outputs: the tensors that a reentrant region returned, which alone have gradients.
    """


# Nobody uses their results, and dead-code elimination must not take them.
for _mark in (begin_checkpoint, end_checkpoint):
    torch.fx.node.has_side_effect(_mark)


def count_regions(graph: fx.Graph) -> int:
    """Return the number of checkpointed regions in a graph, those inside others too."""
    return sum(node.target is begin_checkpoint for node in graph.nodes)


# ---------------------------------------------------------------------- running one


@attrs.frozen(eq=False)
class Recomputed:
    """A reentrant region that runs now: without autograd first, and again in backward.

    Attributes:
        later: what is to be done with tensors that have a gradient only when the region
            runs again, by whatever tells them apart.
        runs_again: whether it will, as far as one can tell.
    """

    later: dict[Any, Callable[[torch.Tensor], None]] = attrs.field(factory=dict)
    runs_again: bool = False


class _Running(threading.local):
    region: Recomputed | None = None


_RUNNING = _Running()


def recomputed_later() -> Recomputed | None:
    """Return the reentrant region that this thread is in, if any."""
    return _RUNNING.region


@contextlib.contextmanager
def _inside(region: Recomputed) -> Iterator[None]:
    before, _RUNNING.region = _RUNNING.region, region
    try:
        yield
    finally:
        _RUNNING.region = before


def checkpointed(  # noqa: PLR0913 - a checkpoint's own, and what it runs
    region: Callable[..., Any],
    self: Any,
    inputs: tuple[Any, ...],
    others: tuple[Any, ...],
    *,
    use_reentrant: bool,
    context_fn: Callable[[], Any] | None = None,
    **settings: Any,
) -> Any:
    """Run a region of a graph through `torch.utils.checkpoint`.

    Args:
        region: the function of the region: `self`, the inputs, the others.
        self: what the graph's code calls so.
        inputs: the arguments of the checkpoint.
        others: what the region uses beside, as a closure does.
        use_reentrant: as in `torch.utils.checkpoint.checkpoint`.
        context_fn: likewise; None where the model gave none.
        settings: likewise.
    """
    if context_fn is not None:
        settings["context_fn"] = context_fn

    def run(*given: Any) -> Any:
        return region(self, *given, *others)

    if use_reentrant and not torch.compiler.is_compiling():
        run = _noted(run, inputs)
    return checkpoint(run, *inputs, use_reentrant=use_reentrant, **settings)


def _noted(run: Callable[..., Any], inputs: Iterable[Any]) -> Callable[..., Any]:
    """Return `run`, which lets others know in which region it is, also when it runs again."""
    outer = _RUNNING.region
    given = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )
    # A region inside one that runs again is run again by that one, and shares what is left to do.
    region = Recomputed(
        {} if outer is None else outer.later, given or (outer is not None and outer.runs_again)
    )

    def noted(*values: Any) -> Any:
        with _inside(region):
            return run(*values)

    return noted
