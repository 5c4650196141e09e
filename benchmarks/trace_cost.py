"""What tracing costs, as ratios to the model's own forward and training step.

    python -m benchmarks.trace_cost [--pairs 100] [--traces 3] [--models mlp,cnn,bert]

Tracing runs the model several times, and has work of its own for every op: the table gives how
many forwards a trace is worth, half a second for that work taken off, verified with gradients and
without. The peak of memory is that of the bytes of all live tensors, counted op by op, as a ratio
to that of a forward and a backward, and to that of a training step with AdamW. The step is that
of the traced model with nothing captured, as a ratio to the plain model's, in alternated pairs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import platform
import statistics
import time
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

import fxray
from benchmarks.models import MODELS as TRAINED
from benchmarks.models import Encoder
from benchmarks.step_time import Interval, interval, measure, ratios, table
from corpus import calls
from corpus.architectures import CASES
from corpus.case import Case, Sizes
from corpus.tiny import TEXT, tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["MODELS", "OWN_SECONDS", "Cost", "Example", "LiveBytes", "cost", "missing"]

OWN_SECONDS = 0.5
"""What a trace may take beside the model's own forwards, whatever the model."""

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model, and the arguments of a call."""


# Models


class _Residual(nn.Module):
    """Two convolutions, each behind its norm, added to what they are given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the block makes of `x` (batch, channel, y, x), of the same shape."""
        return F.relu(x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x))))))


class _Recurrent(nn.Module):
    """An LSTM in two layers and a linear layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 64, 2, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return 10 logits for each row of `x` (batch, place, channel)."""
        logits: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def _mlp() -> Example:
    model, x = TRAINED["mlp"]()
    return model, (x,), {}


def _cnn() -> Example:
    stem = (nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.BatchNorm2d(64), nn.ReLU())
    blocks = (_Residual(64) for _ in range(6))
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, (torch.randn(8, 3, 64, 64),), {}


def _encoder() -> Example:
    return Encoder(width=128, heads=8, blocks=6), (torch.randint(0, 100, (8, 64)),), {}


def _lstm() -> Example:
    return _Recurrent(), (torch.randn(16, 64, 32),), {}


def _case(case: Case, batch: int, length: int) -> Example:
    return case.build(), *case.call(Sizes(batch, length))


_BERT = tiny(
    "bert",
    "BertForMaskedLM",
    calls.filled_masks,
    TEXT | {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024},
)
_TINY = {case.name: case for case in CASES if case.name in ("bert", "gpt2", "t5", "llama")}

MODELS: Mapping[str, Callable[[], Example]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "encoder": _encoder,
    "lstm": _lstm,
    "bert": functools.partial(_case, _BERT, 8, 64),
    **{
        f"tiny {name}": functools.partial(_case, case, case.batches[0], case.lengths[0])
        for name, case in _TINY.items()
    },
}
"""Makers of a model and the call it is traced on."""


def missing(name: str) -> str:
    """Return why the model called `name` cannot be made here, empty where it can."""
    needs = isinstance(MODELS[name], functools.partial)
    return "transformers is not installed" if needs and not _has("transformers") else ""


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors alive while it is entered, and what the peak of them was.

    Args:
        model: whose parameters and buffers count from the start.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an op and count what it gives."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = None
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


def _peak(model: nn.Module, run: Callable[[], object]) -> int:
    live = LiveBytes(model)
    with live:
        run()
    return live.peak


# Costs


@attrs.frozen
class Cost:
    """What tracing one model costs.

    Attributes:
        forward: seconds of one forward of the model.
        trace: seconds of a trace verified with gradients.
        without: seconds of one verified without.
        memory: peak of live bytes while tracing, over that of a forward and a backward.
        trained: the same over that of a training step with AdamW.
        step: a training step of the traced model over the plain model's.
    """

    forward: float
    trace: float
    without: float
    memory: float
    trained: float
    step: Interval

    def forwards(self, seconds: float) -> float:
        """Return how many forwards `seconds` are worth, `OWN_SECONDS` taken off."""
        return (seconds - OWN_SECONDS) / self.forward


def _backward(out: Any) -> None:
    loss = out if isinstance(out, torch.Tensor) else out.loss
    loss.square().mean().backward()


def _stepper(
    model: Callable[..., Any], owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], None]:
    def step() -> None:
        _backward(model(*args, **kwargs))
        owner.zero_grad()

    return step


def _train(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # At a rate of zero, for the model is to stay as it is.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for _ in range(2):  # what it keeps is there from the second step on
        _backward(model(*args, **kwargs))
        optimizer.step()
        optimizer.zero_grad()


def _seconds(run: Callable[[], object], times: int) -> float:
    """Return the median of the processor's time: other programs do not count."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def cost(name: str, pairs: int, traces: int, forwards: int = 20) -> Cost:
    """Return what tracing the model called `name` costs.

    Args:
        name: one of `MODELS`.
        pairs: rounds of one step of each, plain and traced.
        traces: of how many traces of each kind the median is given.
        forwards: the same of the forward.
    """
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    model.train()

    def trace(*, gradients: bool = True) -> fxray.Xray:
        return fxray.Xray(model, args, kwargs, gradients=gradients)

    step = _stepper(model, model, args, kwargs)
    xray = trace()
    step()
    peak = _peak(model, trace)
    seconds = measure([step, _stepper(xray.graph_module, model, args, kwargs)], pairs)
    return Cost(
        _seconds(lambda: model(*args, **kwargs), forwards),
        _seconds(trace, traces),
        _seconds(lambda: trace(gradients=False), traces),
        peak / _peak(model, step),
        peak / _peak(model, functools.partial(_train, model, args, kwargs)),
        interval(ratios(seconds)[:, [1]], lambda medians: medians[:, 0]),
    )


def _line(name: str, found: Cost) -> list[str]:
    return [
        name,
        f"{found.forward * 1e3:.1f}",
        f"{found.trace:.2f}",
        f"{found.forwards(found.trace):.1f}",
        f"{found.without:.2f}",
        f"{found.forwards(found.without):.1f}",
        f"{found.memory:.2f}",
        f"{found.trained:.2f}",
        str(found.step),
    ]


_HEAD = [
    "model",
    "forward ms",
    "trace s",
    "forwards",
    "without s",
    "forwards",
    "memory",
    "AdamW",
    "step",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace_cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=100, help="rounds of steps (100)")
    parser.add_argument("--traces", type=int, default=3, help="traces of each kind (3)")
    parser.add_argument("--models", default=",".join(MODELS), help="names, joined by commas")
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    lines, skipped = [_HEAD], []
    for name in given.models.split(","):
        why = missing(name)
        if why:
            skipped.append(f"{name}: skipped, {why}")
        else:
            lines.append(_line(name, cost(name, given.pairs, given.traces)))
    print(
        f"forwards: (s - {OWN_SECONDS}) / forward, with and without gradients; a value below 0 is "
        "a trace faster than that.\n"
        "memory, AdamW, step: as ratios to the plain model's training step; step: "
        f"median of {given.pairs} rounds [95 % bounds].\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} thread, "
        f"Python {platform.python_version()}\n"
    )
    print("\n".join([table(lines), *skipped]))


if __name__ == "__main__":
    main()
