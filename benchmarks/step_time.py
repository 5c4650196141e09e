"""The time of a training step with fxray, as a ratio to the plain model's.

    python -m benchmarks.step_time [--pairs 200] [--models mlp,cnn,encoder]

Five ways to train the same model from the same weights on the same batch, in one process: plain;
rewritten with nothing marked; rewritten with the mean of the output and of the gradient of every op
kept in memory; plain with PyTorch's forward and backward hooks keeping the same means of every
module; the same with the leanest hooks there are, a forward hook that hooks the tensor it is shown.
A round times one step of each, in an order drawn anew, and divides by the plain step of that round:
what the machine does meanwhile meets all alike. The table gives the median of these ratios and, by
bootstrap over the rounds, the bounds it lies in with 95 % confidence.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import platform
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fxray

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "MODELS",
    "WAYS",
    "Interval",
    "ModuleMeans",
    "Runner",
    "Way",
    "interval",
    "measure",
    "ratios",
    "runners",
    "table",
]

Way = Literal["plain", "unmarked", "marked", "hooks", "lean hooks"]
WAYS: tuple[Way, ...] = get_args(Way)


# Models


class Encoder(nn.Module):
    """A transformer encoder in two blocks, written with the ops that people write."""

    class Block(nn.Module):
        """Attention and a feed-forward layer, each behind its norm, each added to its input."""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return what the block makes of `x` (batch, place, channel), of the same shape."""
            qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.transpose(1, 3).unbind(2)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.out(attended)
            mixed: torch.Tensor = self.down(F.gelu(self.up(self.before_mlp(x))))
            return x + mixed

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.Sequential(*(self.Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return 10 logits for each row of `tokens` (batch, place)."""
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.embed(tokens))).mean(1))
        return logits


def _mlp() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 256)


def _cnn() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 10)),
    )
    return model, torch.randn(16, 3, 32, 32)


def _encoder() -> tuple[nn.Module, torch.Tensor]:
    return Encoder(), torch.randint(0, 100, (16, 32))


MODELS: Mapping[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "encoder": _encoder,
}
"""Makers of a model and its input; the first dimension of the input is the batch."""


# Ways


class ModuleMeans:
    """Plain PyTorch hooks that keep the mean of the output and of its gradient, every call.

    Hooks see modules alone: a functional activation, an addition or a reshape has none.

    Attributes:
        kept: (path, kind, 0-dim tensor), in the order they came; kind is output or grad.
    """

    def __init__(self, model: nn.Module, *, lean: bool) -> None:
        self.kept: list[tuple[str, str, torch.Tensor]] = []
        self.sites = 0
        for path, module in model.named_modules():
            if not any(module.children()):
                module.register_forward_hook(self._forward(path, lean=lean))
                if not lean:
                    module.register_full_backward_hook(self._backward(path))
                self.sites += 1

    def _forward(self, path: str, *, lean: bool) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            self.kept.append((path, "output", output.detach().mean()))
            if lean and output.requires_grad:
                output.register_hook(keep_grad)

        def keep_grad(grad: torch.Tensor) -> None:
            self.kept.append((path, "grad", grad.mean()))

        return keep

    def _backward(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _grad_input: Any, grad_output: Any) -> None:
            self.kept.append((path, "grad", grad_output[0].mean()))

        return keep


@attrs.frozen
class Runner:
    """One way to train one model.

    Attributes:
        way: which of the five.
        step: trains one step and returns its loss.
        sites: how many places keep an output and a gradient.
        means: what the hooks kept, for those ways; else None.
        recorder: what fxray keeps into, for the marked way; else None.
    """

    way: Way
    step: Callable[[], torch.Tensor]
    sites: int = 0
    means: ModuleMeans | None = None
    recorder: fxray.Recorder | None = None


def _trainer(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> torch.Tensor:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@contextlib.contextmanager
def runners(name: str, ways: Sequence[Way] = WAYS) -> Iterator[dict[Way, Runner]]:
    """Yield the `ways` to train the model called `name`, all from the same weights."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.train()
    y = torch.randint(0, 10, (x.shape[0],))
    with contextlib.ExitStack() as stack:
        # The first layer's input needs no gradient, which torch tells whoever hooks it.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Full backward hook is firing")

        found: dict[Way, Runner] = {}
        for way in ways:
            own = copy.deepcopy(model)
            if way == "plain":
                found[way] = Runner(way, _trainer(own, x, y))
            elif way == "unmarked":
                xray = fxray.trace(own, x)
                xray.draft.clear()
                found[way] = Runner(way, _trainer(xray.rewrite(), x, y))
            elif way == "marked":
                xray = fxray.trace(own, x)
                sites = _mark_every_op(xray)
                net = xray.rewrite()
                recorder = stack.enter_context(fxray.record(net))
                found[way] = Runner(way, _trainer(net, x, y), sites, recorder=recorder)
            else:
                means = ModuleMeans(own, lean=way == "lean hooks")
                found[way] = Runner(way, _trainer(own, x, y), means.sites, means=means)
        yield found


def _mark_every_op(xray: fxray.Xray) -> int:
    """Mark output and gradient of every op that puts out float32; return how many ops."""
    xray.draft.clear()
    sites = [
        path
        for path, op in xray.architecture.items()
        if op.role not in {"input", "parameter"}
        and all(spec.dtype == "float32" for spec in op.outputs)
    ]
    for path in sites:
        xray.mark(path, output=True, grad=True, selection=fxray.Mean())
    return len(sites)


# Measuring


@attrs.frozen
class Interval:
    """A median and the bounds in which it lies with 95 % confidence."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    rows: NDArray[np.float64],
    figure: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    draws: int = 2000,
) -> Interval:
    """Return `figure` of the medians over `rows`, with its bootstrap bounds.

    Rows are drawn again whole, so that what was measured side by side stays together.

    Args:
        rows: (round, column).
        figure: from medians (draw, column) to one number per draw (draw,).
        draws: how many times the rows are drawn again.

    >>> ones = np.ones((50, 2))
    >>> str(interval(ones, lambda medians: medians[:, 0] + medians[:, 1]))
    '2.000 [2.000, 2.000]'
    """
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(rows), (draws, len(rows)))
    drawn = figure(np.stack([np.median(rows[pick], axis=0) for pick in picks]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    middle = figure(np.median(rows, axis=0)[None])[0]
    return Interval(float(middle), float(low), float(high))


def measure(
    steps: Sequence[Callable[[], object]], pairs: int, warm_up: int = 10
) -> NDArray[np.float64]:
    """Return the seconds of each step: (round, step)."""
    for _ in range(warm_up):
        for step in steps:
            step()
    gc.collect()
    seconds = np.empty((pairs, len(steps)))
    # Drawn anew every round: in a fixed order each way would always find the caches as the same
    # other way leaves them.
    generator = np.random.default_rng(0)
    for turn in range(pairs):
        for column in generator.permutation(len(steps)):
            start = time.perf_counter()
            steps[column]()
            seconds[turn, column] = time.perf_counter() - start
    return seconds


def ratios(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the seconds of each step over those of the first of its round."""
    return seconds / seconds[:, :1]


def _share(rival: Way) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    marked, other = WAYS.index("marked"), WAYS.index(rival)
    return lambda medians: (medians[:, marked] - 1) / (medians[:, other] - 1)


def _line(name: str, ways: Mapping[Way, Runner], seconds: NDArray[np.float64]) -> list[str]:
    shares = ratios(seconds)
    milliseconds = float(np.median(seconds[:, 0])) * 1e3
    keeping = {WAYS.index(way): ways[way].sites for way in WAYS if ways[way].sites}
    each = [
        f"{(float(np.median(shares[:, column])) - 1) * milliseconds * 1e3 / sites:.0f}"
        for column, sites in keeping.items()
    ]
    return [
        name,
        f"{milliseconds:.2f}",
        *(str(interval(shares[:, [c]], lambda m: m[:, 0])) for c in range(1, len(WAYS))),
        str(interval(shares, _share("hooks"))),
        str(interval(shares, _share("lean hooks"))),
        " / ".join(map(str, keeping.values())),
        " / ".join(each),
    ]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines with their cells one below the other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=200, help="rounds of each model (200)")
    parser.add_argument("--models", default=",".join(MODELS), help="names, joined by commas")
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    lines = [["model", "plain ms", *WAYS[1:], "of hooks", "of lean hooks", "sites", "µs a site"]]
    for name in given.models.split(","):
        with runners(name) as ways:
            steps = [ways[way].step for way in WAYS]
            lines.append(_line(name, ways, measure(steps, given.pairs)))
    print(
        f"One training step as a ratio to the plain model's: median of {given.pairs} rounds "
        "[95 % bounds].\n"
        "of hooks, of lean hooks: the overhead of marked as a share of theirs, whole step by whole "
        "step;\nsites, µs a site: marked / hooks / lean hooks. Hooks see modules alone, "
        "fxray every op.\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} thread, "
        f"Python {platform.python_version()}\n"
    )
    print(table(lines))


if __name__ == "__main__":
    main()
