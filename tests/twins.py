"""A model and its untouched twin, called alike: what must be equal to the bit, and recorded."""

# mypy: ignore-errors

from __future__ import annotations

import copy
import random
import warnings
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

import fxray
from tests.models import LEAVES, Witness, tensors_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def seed_all(seed: int) -> None:
    """Seed every global source of random numbers that a forward may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what models draw from


def call(net: nn.Module, *args: Any, seed: int = 4, **kwargs: Any) -> dict[str, Any]:
    """Run one forward, and a backward where there is one; return all that could differ."""
    seed_all(seed)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    out = net(*args, **kwargs)
    flat = dict(tensors_in(vars(out) if hasattr(type(out), "__dataclass_fields__") else out))
    graded = [t.float().square().sum() for t in flat.values() if t.requires_grad]
    if graded:
        sum(graded).backward()
    return {
        "kind": type(out),
        "out": flat,
        "requires_grad": {name: t.requires_grad for name, t in flat.items()},
        "grad": {name: p.grad for name, p in parameters.items() if p.grad is not None},
        "buffer": {name: b.clone() for name, b in net.named_buffers()},
        "rng": {"torch": torch.get_rng_state()},
        "python rng": (random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Fail unless two calls gave the same, to the bit."""
    for what, expected in theirs.items():
        found = ours[what]
        if not isinstance(expected, dict):
            assert found == expected, what
            continue
        assert list(found) == list(expected), what
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype, (what, name)
                assert torch.equal(found[name], value), (what, name)
            else:
                assert found[name] == value, (what, name)


class Twins:
    """A rewritten net and an untouched copy of its model, which see the same calls.

    Everything of the net is captured; plain hooks on the copy tell what must have been.
    """

    def __init__(self, model: nn.Module, *args: Any, options: Any = None, **kwargs: Any) -> None:
        self.model, self.twin = model, copy.deepcopy(model)
        self.witness = Witness()
        self.xray = fxray.Xray(model, args, kwargs, **(options or {}))
        self.mark_all()
        self.net = self.xray.rewrite()
        self.hooked = copy.deepcopy(self.twin)
        self.witness.hook(self.hooked, LEAVES)
        self.recorder: Any = None
        self.outputs: list[dict[str, torch.Tensor]] = []

    def mark_all(self) -> None:
        """Mark the output, gradient and input of everything there is now."""
        self.xray.mark("*", output=True, grad=True, input=True, selection=fxray.Whole())

    @property
    def both(self) -> Iterator[nn.Module]:
        """The model, the twin and the twin that is watched: what is done is done to all."""
        return iter((self.model, self.twin, self.hooked))

    @property
    def graphs(self) -> dict[str, int]:
        """How many graphs of each mode there are now."""
        return {mode: len(self.net.family.of(mode)) for mode in ("train", "eval")}

    def names(self) -> list[str]:
        """The name of every graph there is now."""
        return [program.name for program in self.net.family.programs]

    def call(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call all three in the mode they are in; fail unless they give the same."""
        theirs = call(self.twin, *_fresh(args), **_fresh(kwargs))
        ours = call(self.net, *_fresh(args), **_fresh(kwargs))
        assert_same(ours, theirs)
        self.witness.begin()
        call(self.hooked, *_fresh(args), **_fresh(kwargs))
        self.outputs.append({k: t.detach().clone() for k, t in ours["out"].items()})
        return ours

    def call_both(self, *args: Any, **kwargs: Any) -> None:
        """Call in train and in eval mode; fail unless they give the same."""
        for training in (True, False):
            for module in self.both:
                module.train(training)
            self.call(*args, **kwargs)
        for module in self.both:
            module.train()

    def call_each(self, inputs: Iterable[Any], *, both: bool = True) -> None:
        """Call on one input after another, in both modes or in the one they are in."""
        for x in inputs:
            (self.call_both if both else self.call)(x)

    def __enter__(self) -> Self:
        self._begin()
        return self

    def _begin(self) -> None:
        self.watched = {capture.op for capture in self.net.captures}
        self.recorder = fxray.record(self.net)

    def __exit__(self, kind: object, *_: object) -> None:
        self._close()
        if kind is None:
            self.assert_captured()

    def _close(self) -> None:
        with warnings.catch_warnings():  # of a marked input, say, nothing is kept
            warnings.filterwarnings("ignore", "nothing was kept of", fxray.FxrayWarning)
            self.recorder.close()

    def begin_again(self) -> None:
        """Check what was recorded until now, mark all there is by now, and begin another run."""
        self._close()
        self.assert_captured()
        self.witness.seen.clear()
        self.mark_all()
        self._begin()

    def assert_captured(self) -> None:
        """Fail unless the run holds what plain hooks saw of every module, row for row."""
        run = self.recorder.run
        seen = {key: value for key, value in self.witness.seen.items() if key[0] in self.watched}
        assert seen
        for (op, kind, item), tensors in seen.items():
            kept = records(getattr(run[op], kind), item)
            assert len(kept) == len(tensors), (op, kind, item, len(kept), len(tensors))
            for ours, theirs in zip(kept, tensors, strict=True):
                assert np.array_equal(ours, theirs.numpy()), (op, kind, item)


def records(series: Any, item: str = "") -> list[np.ndarray]:
    """Return what was kept of one item, in the order in which it came."""
    rows = sorted(series, key=lambda pair: pair[0].time)
    return [record[item] if isinstance(record, dict) else record for _, record in rows]


def _fresh(values: Any) -> Any:
    """Return copies of the tensors among arguments, for forwards that write them."""
    if isinstance(values, torch.Tensor):
        return values.detach().clone().requires_grad_(values.requires_grad)
    if isinstance(values, dict):
        return {key: _fresh(value) for key, value in values.items()}
    if isinstance(values, tuple) and not hasattr(values, "_fields"):
        return tuple(map(_fresh, values))
    return [*map(_fresh, values)] if isinstance(values, list) else values


def assert_agree(models: Iterable[nn.Module], *args: Any, **kwargs: Any) -> None:
    """Fail unless all these give the same in the mode they are in."""
    first, *rest = [call(model, *_fresh(args), **_fresh(kwargs)) for model in models]
    for other in rest:
        assert_same(other, first)
