"""A traced module against its original: same outputs, same gradients, or how far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.torch_private import acts_on_gradients
from fxray.tracing.alone import How, alone
from fxray.tracing.example import Example, Size
from fxray.tracing.results import every_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ROUNDING", "Comparison", "compare"]

ROUNDING = 1e-3
"""The relative difference up to which two computations may be the same one, rounded."""


@attrs.frozen
class Comparison:
    """The largest difference found, relative to the largest number; 0 means bit-equal.

    Attributes:
        outputs: over every tensor returned; infinite where the structure differs.
        gradients: over the gradient of every parameter; None where none was computed.
        numbers: whether there were any to compare: on the meta device there are none.
    """

    outputs: float
    gradients: float | None = None
    numbers: bool = True

    @property
    def equal(self) -> bool:
        """Whether there was what to compare, and all of it was bit-equal."""
        return self.numbers and not self.outputs and not self.gradients

    @property
    def wrong(self) -> bool:
        """Whether the two differ by more than rounding."""
        return max(self.outputs, self.gradients or 0.0) > ROUNDING

    def __str__(self) -> str:
        if self.equal:
            return "verified bit-equal" + ("" if self.gradients is None else ", gradients equal")
        if not self.numbers and not self.wrong:
            return "not verified: tensors on the meta device hold no numbers to compare"
        text = f"outputs differ by up to {self.outputs:.2g} of their size"
        return text + ("" if self.gradients is None else f", gradients by {self.gradients:.2g}")


@attrs.frozen
class Trial:
    """How two computations are put beside one another.

    Attributes:
        how: the mode, autograd, random numbers: the same for both.
        sizes: those of the input.
        gradients: whether to compare the gradient of every parameter too.
    """

    how: How
    sizes: Mapping[Size, int]
    gradients: bool = True


def compare(
    original: nn.Module, product: Callable[..., Any], example: Example, trial: Trial
) -> Comparison:
    """Run both with the same random numbers and compare; neither leaves anything behind.

    Args:
        original: the user's model.
        product: the traced module, which shares the model's parameters.
        example: the call.
        trial: how to run it, and what to compare.
    """
    ours = _run(original, product, example, trial)
    theirs = _run(original, original, example, trial)
    return Comparison(
        _distance(ours[0], theirs[0]),
        None if ours[1] is None or theirs[1] is None else _distance(ours[1], theirs[1]),
        numbers=not any(tensor.is_meta for _, tensor in theirs[0]),
    )


_Flat = list[tuple[str, torch.Tensor]]


def _run(
    model: nn.Module, product: Callable[..., Any], example: Example, trial: Trial
) -> tuple[_Flat, _Flat | None]:
    with alone(model, trial.how) as state:
        for tensor in example.written:
            state.protect(tensor)
        _, args, kwargs = example.sized(trial.sizes)
        out = list(every_tensor(product(*args, **kwargs)))
        gradients = _gradients(model, out) if trial.gradients and trial.how.grad else None
        return [(item, t.detach().clone()) for item, t in out], gradients


def _gradients(model: nn.Module, out: _Flat) -> _Flat | None:
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = [t for _, t in out if t.requires_grad and t.numel()]
    if not parameters or not parts:
        return None
    # Squares, so that a layer whose outputs sum to a constant (softmax) still has a gradient.
    squares = [
        t.abs().square().sum() if t.is_complex() else t.float().square().sum() for t in parts
    ]
    total = torch.stack([square.to(squares[0]) for square in squares]).sum()
    try:
        tensors = [p for _, p in parameters]
        grads: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            total, tensors, retain_graph=True, allow_unused=True
        )
    except RuntimeError:  # reentrant checkpointing takes no inputs=
        grads = _gradients_by_backward(total, tensors)
    return [(name, g) for (name, _), g in zip(parameters, grads, strict=True) if g is not None]


def _gradients_by_backward(
    total: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    if any(map(acts_on_gradients, parameters)):  # an optimizer in the backward would step
        return (None,) * len(parameters)
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        total.backward()
        return tuple(p.grad for p in parameters)
    except RuntimeError:  # the model itself has no gradient, whatever it computes
        return (None,) * len(parameters)
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def _distance(
    ours: Sequence[tuple[str, torch.Tensor]], theirs: Sequence[tuple[str, torch.Tensor]]
) -> float:
    if [item for item, _ in ours] != [item for item, _ in theirs]:
        return math.inf
    return max((_apart(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)), default=0.0)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (t if t.layout is torch.strided else t.to_dense() for t in (a, b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.is_meta or not a.numel() or torch.equal(a, b):  # meta tensors: see `numbers`
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, torch.zeros_like(a), a - b).abs().max().item()
    size = torch.where(b.isfinite(), b, torch.zeros_like(b)).abs().max().item()
    return math.inf if math.isnan(apart) else float(apart / (size or 1.0))
