"""One call of a model, forward and backward, and all that it did, to the bit."""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import nn

from corpus.bits import Frozen, differs, frozen, tensors_in
from corpus.case import Sizes
from corpus.leaks import random_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from corpus.case import Case

__all__ = ["Result", "Step", "base", "cotangents", "plan", "run", "seed_all"]


@attrs.frozen
class Step:
    """One call: in which mode, at which sizes, with or without gradients."""

    mode: str
    sizes: Sizes
    draws: int
    grad: bool = True

    def __str__(self) -> str:
        return f"{self.mode}{'' if self.grad else ' without grad'}, {self.sizes}"


@attrs.frozen(eq=False)
class Result:
    """What a call did.

    Attributes:
        error: what it raised, or None.
        did: outputs, gradients, buffers and random state after it, by name.
        seconds: forward and backward.
        buffers: by name, after the call, to carry on from where the product gave up.
    """

    error: Exception | None
    did: tuple[tuple[str, Frozen], ...]
    seconds: float
    buffers: dict[str, torch.Tensor]

    def differs(self, theirs: Result) -> Iterator[str]:
        """Yield in words what was done differently."""
        for (name, ours), (_, other) in zip(self.did, theirs.did, strict=True):
            found = differs(ours, other, name)
            if found:
                yield found


def seed_all(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what models draw from


def base(case: Case, seed: int = 0) -> Sizes:
    """Return the sizes that `case` is traced at."""
    return Sizes(case.batches[0], case.lengths[0], seed if "values" in case.varies else 0)


def _all_sizes(case: Case) -> Iterator[Sizes]:
    first = base(case)
    values = [0, 1, 2, 3] if "values" in case.varies else [0]
    batches = case.batches if "batch" in case.varies else case.batches[:1]
    lengths = case.lengths if "length" in case.varies else case.lengths[:1]
    for seed in values:
        yield attrs.evolve(first, seed=seed)
    for seed, batch in enumerate(batches[1:], 4):
        yield Sizes(batch, first.length, seed % len(values) if len(values) == 1 else seed)
    for seed, length in enumerate(lengths[1:], 7):
        yield Sizes(first.batch, length, 0 if len(values) == 1 else seed)
    if len(batches) > 1 and len(lengths) > 1:
        yield Sizes(batches[-1], lengths[-1], values[-1])
    if len(batches) + len(lengths) > 2:
        yield base(case, seed=10)


def plan(case: Case) -> list[Step]:
    """Return the calls by which a product is compared with the model."""
    sizes = list(_all_sizes(case))
    steps = [("train", size, True) for size in sizes] if case.training else []
    steps += [("eval", size, True) for size in sizes[:2]]
    steps += [("eval", size, False) for size in sizes]
    if case.training:
        steps.append(("train", base(case, seed=5), True))
    return [Step(mode, size, 100 + at, grad) for at, (mode, size, grad) in enumerate(steps)]


def cotangents(tensors: Iterable[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Return a gradient to begin from for every tensor, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in tensors]


def backward(out: Any, seed: int) -> None:
    """Run the backward from every tensor in `out` that has one."""
    found = {id(t): t for t in tensors_in(out) if t.requires_grad}
    tensors = [t for t in found.values() if t.layout is torch.strided]
    if tensors:
        torch.autograd.backward(tensors, cotangents(tensors, seed))


def run(module: nn.Module, case: Case, step: Step) -> Result:
    """Call `module` as `step` says and tell all that it did."""
    args, kwargs = case.call(step.sizes)
    given = [*tensors_in((args, kwargs))]
    module.train(step.mode == "train")
    for parameter in module.parameters():
        parameter.grad = None
    seed_all(step.draws)
    did: list[tuple[str, Frozen]] = []
    error = None
    begun = time.perf_counter()
    try:
        with contextlib.nullcontext() if step.grad else torch.no_grad():
            out = module(*args, **kwargs)
        did.append(("the output", frozen(out)))
        did.append(("what the output shares memory with", frozen(_shared(out, given, module))))
        if step.grad:
            backward(out, step.draws)
    except Exception as caught:  # noqa: BLE001 - a model may raise anything
        error = caught
    seconds = time.perf_counter() - begun
    if error is None:
        did += [
            ("grad of ", frozen({name: p.grad for name, p in module.named_parameters()})),
            ("grad of input", frozen([t.grad if t.is_leaf else None for t in given])),
            ("the input afterwards", frozen(given)),
            ("buffer ", frozen(dict(module.named_buffers()))),
            ("", random_state()),
        ]
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    return Result(error, tuple(did), seconds, buffers)


def _shared(out: Any, given: list[torch.Tensor], module: nn.Module) -> list[str]:
    """Say of every tensor returned with which input, parameter or buffer it shares memory."""
    owners: dict[int, str] = {}
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in [(f"input {at}", t) for at, t in enumerate(given)] + named:
        if tensor.layout is torch.strided:
            owners.setdefault(tensor.untyped_storage().data_ptr(), name)
    owners.pop(0, None)
    return [
        owners.get(t.untyped_storage().data_ptr(), "") if t.layout is torch.strided else ""
        for t in tensors_in(out)
    ]
