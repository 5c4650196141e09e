"""A model run so that nothing of it is left behind: not in it, not in the random numbers."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import nn

from fxray.tracing.state import ModelState

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "How",
    "alone",
    "is_alone",
    "preserved_rng",
    "python_rng",
    "rng_states",
    "set_rng_states",
    "training_flags",
    "uncompiled",
]


@contextlib.contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Put torch's, Python's and numpy's random state back on leaving.

    Args:
        seed: if given, seeds all of them on entering.
    """
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    with torch.random.fork_rng(devices=_cuda_devices()):
        try:
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                if numpy_random:
                    numpy_random.seed(seed)
            yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)


def _cuda_devices() -> list[int]:
    # An uninitialised CUDA has no random state of ours to keep, and asking would start it.
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def python_rng() -> tuple[Any, ...]:
    """Return the state of Python's and numpy's own random numbers, to be compared."""
    # The global ones: what models draw from.
    drawn: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = drawn
    return random.getstate(), name, keys.tobytes(), *rest


def rng_states() -> tuple[Any, ...]:
    """Return the state of the random numbers that graphs draw: torch's, on every device."""
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in _cuda_devices()]
    return torch.get_rng_state(), cuda


def set_rng_states(states: tuple[Any, ...]) -> None:
    """Put back what `rng_states` returned."""
    cpu, cuda = states
    torch.set_rng_state(cpu)
    for device, state in cuda:
        torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def training_flags(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run with the model in one mode, every sub-module's own flag put back on leaving.

    A model already in that mode keeps its pattern of flags: a frozen sub-module in
    eval inside a training model stays so.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        if model.training != training:
            # Not by model.train(): one of the user's may do more (merge weights, freeze parts).
            for module in model.modules():
                module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class _Uncompiled:
    """Who wants nothing compiled now: torch holds one stance for all threads together.

    Were each to put back what it found, the last of two that overlap would leave it so.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._undo.enter_context(torch.compiler.set_stance("force_eager"))
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()


_UNCOMPILED = _Uncompiled()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run parts that are compiled as they were written: a compiler cannot look through a mode."""
    if "torch._dynamo" not in sys.modules:  # then nothing is
        yield
        return
    _UNCOMPILED.enter()
    try:
        yield
    finally:
        _UNCOMPILED.leave()


_ALONE = threading.local()


def is_alone() -> bool:
    """Return whether this thread runs a model for a trace, so that nothing of it counts."""
    return bool(getattr(_ALONE, "depth", 0))


@attrs.frozen
class How:
    """How a call is run to be traced or compared.

    Attributes:
        training: the mode.
        grad: whether autograd is on.
        seed: of the random numbers.
    """

    training: bool
    grad: bool = True
    seed: int = 0


@contextlib.contextmanager
def alone(model: nn.Module, how: How) -> Iterator[ModelState]:
    """Run what is inside so that nothing of it is left behind, also on error.

    Args:
        model: whose buffers, flags and Python state are put back.
        how: the mode, autograd, random numbers.
    """
    state = ModelState(model)
    depth = getattr(_ALONE, "depth", 0)
    _ALONE.depth = depth + 1
    try:
        with (
            preserved_rng(how.seed),
            training_flags(model, training=how.training),
            torch.set_grad_enabled(how.grad),
            uncompiled(),
        ):
            yield state
    finally:
        _ALONE.depth = depth
        state.restore()
