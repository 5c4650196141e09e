"""Trains a small network on handwritten digits and shows what was recorded of it.

It uses the public names of fxray and nothing else, so it is an example too: `train` is a
plain PyTorch loop with a recorder in it, `watch` says what to keep, `PICTURES` what to draw.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxray

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EPOCHS", "PICTURES", "DigitNet", "Picture", "demo", "digits", "train", "watch"]

EPOCHS = 8
SEED = 0
HELD_OUT = 200
BATCH = 32
"""Digits per batch: 1,597 of them make 50, so every tenth step meets batch 40 of each epoch."""

# ---------------------------------------------------------------------------- the training


class DigitNet(nn.Module):
    """A small CNN; its activations are function calls, which no hook on a module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return a score per digit, (N, 10), for images (N, 1, 8, 8)."""
        x = F.relu(self.conv1(image))
        x = torch.relu(self.conv2(x))
        x = F.max_pool2d(x, 2).flatten(1)
        x = F.relu(self.hidden(x))
        scores: torch.Tensor = self.head(x)
        return scores


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return 1,597 handwritten digits to train on and 200 to validate with, in batches.

    They come with scikit-learn: 8 × 8 grey pixels, here from 0 to 1.
    """
    from sklearn.datasets import load_digits  # an extra, so not above

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    shuffle = torch.Generator().manual_seed(SEED)
    return (
        DataLoader(
            TensorDataset(images[rest], labels[rest]), BATCH, shuffle=True, generator=shuffle
        ),
        DataLoader(TensorDataset(images[held_out], labels[held_out]), batch_size=20),
    )


def watch(model: DigitNet, image: torch.Tensor) -> fxray.Xray:
    """Trace `model` and say what to keep of it."""
    xray = fxray.trace(model, image)
    # The weights of every layer and the outputs of every activation are in the draft by
    # default; here they are wanted every ten steps, with the digits that went in.
    layers = [model.conv1, model.conv2, model.hidden, model.head]
    xray.mark(layers, weight=True, every=10)
    xray.mark(["image", F.relu], output=True, every=10)
    # Of the gradients that come back to the activations, statistics at every step; of
    # those of the weights, as the optimizer used them, how large they are.
    xray.mark(F.relu, grad=True, selection=fxray.Stats())
    xray.mark(layers, weight_grad=True, selection=fxray.Norm())
    # Of the ten scores per digit, how they are spread.
    xray.mark(model.head, output=True, selection=fxray.Histogram(40, (-20, 20)), every=10)
    return xray


def train(net: nn.Module, recorder: fxray.Recorder, epochs: int) -> float:
    """Train `net` on the digits; return the share of those held out that it gets right."""
    loader, held_out = digits()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    accuracy = 0.0
    for epoch in range(epochs):
        net.train()
        for image, label in recorder.epoch(loader):
            scores = net(image)
            loss = F.cross_entropy(scores, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss, accuracy=(scores.argmax(1) == label).float().mean())
        net.eval()
        right = 0
        with torch.no_grad():
            for image, label in recorder.phase("valid", held_out):
                right += int((net(image).argmax(1) == label).sum())
        accuracy = right / HELD_OUT
        recorder.log(valid_accuracy=accuracy)
        said = f"  epoch {epoch}   loss {loss.item():.3f}   held-out digits right {accuracy:.1%}"
        print(said, flush=True)
    return accuracy


# ---------------------------------------------------------------------------- the pictures


@attrs.frozen
class Picture:
    """A picture that the demo draws of its run.

    Attributes:
        file: its name.
        words: what it shows.
        draw: gives the figure.
    """

    file: str
    words: str
    draw: Callable[[fxray.Run], Any]


def _steps(series: fxray.Series, phase: str = "train") -> list[int]:
    """Return every step at which something was kept in that phase."""
    steps: list[int] = series.in_phase(phase).steps.tolist()
    return steps


PICTURES = (
    Picture(
        "loss.png",
        "the loss at every step",
        lambda run: run.log["loss"].plot(),
    ),
    Picture(
        "image-batch-40.png",
        "the digits of batch 40",
        lambda run: run["image"].output.plot(step=40),
    ),
    Picture(
        "relu-batch-40.png",
        "what F.relu made of them: maps of 16 channels",
        lambda run: run["relu"].output.plot(step=40),
    ),
    Picture(
        "relu-same-digit.png",
        "its maps of one held-out digit, after each epoch",
        lambda run: run["relu"].output.plot(
            phase="valid", steps=_steps(run["relu"].output, "valid")
        ),
    ),
    Picture(
        "relu_2-gradients.png",
        "statistics of the gradients that come back to the last F.relu, and the loss",
        lambda run: run["relu_2"].grad.plot(loss=run.log["loss"]),
    ),
    Picture(
        "conv1-filters.png",
        "the filters of the first layer at the end",
        lambda run: run["conv1"].weight.plot(),
    ),
    Picture(
        "conv1-filters-over-steps.png",
        "the same filters as they formed",
        lambda run: run["conv1"].weight.plot(steps=_steps(run["conv1"].weight)),
    ),
    Picture(
        "hidden-weights.png",
        "weights of the hidden layer, from first to last",
        lambda run: run["hidden"].weight.plot(steps=_steps(run["hidden"].weight)),
    ),
    Picture(
        "conv2-weight-gradient.png",
        "how large the gradient of the second layer's weights was",
        lambda run: run["conv2"].weight_grad.plot(loss=run.log["loss"]),
    ),
    Picture(
        "head-histogram.png",
        "how the ten scores spread as the network learns",
        lambda run: run["head"].output.plot(),
    ),
)

# ---------------------------------------------------------------------------- the demo


def demo(out: str | os.PathLike[str] = "fxray-demo", epochs: int = EPOCHS) -> fxray.Run:
    """Train, record, draw, and say where everything is.

    Args:
        out: folder for the run (in `runs` beneath it) and the pictures; made if need be.
        epochs: how many times the network sees all digits, at least 1.

    Returns:
        The run, to read.

    Raises:
        MissingExtraError: a library of the `demo` extra is not installed; nothing was done.
        StoreError: `out` cannot be written.
    """
    _check_extras()
    folder = Path(out)
    runs = folder / "runs"
    before = _runs_in(runs)
    with _one_thread():
        torch.manual_seed(SEED)
        model = DigitNet()
        image, _ = next(iter(digits()[0]))
        xray = watch(model, image)
        print(f"A small CNN learns handwritten digits; {folder}/graph.svg shows it.")
        print(f"\n{textwrap.indent(str(xray.report), '  ')}\n")
        if before:
            print(
                f"{runs} has {before} run{'s' if before > 1 else ''} already: this one is added, "
                "and its pictures replace those of the one before.\n"
            )
        for suffix in ("svg", "png"):
            xray.render(folder / f"graph.{suffix}", title="DigitNet: what will be kept")
        net = xray.rewrite()
        # A commit a second: whenever this is killed, all but the last second can be read.
        with fxray.record(net, runs, name="digits", commit_every=1.0) as recorder:
            accuracy = train(net, recorder, epochs)
    run = fxray.open(runs, recorder.id)
    print(f"\nIt reads {accuracy:.1%} of the digits that it never saw. What was saved:\n")
    print(_saved(run))
    _draw(run, folder)
    _say_where(run, runs)
    return run


def _check_extras() -> None:
    libraries = {"scikit-learn": "sklearn", "matplotlib": "matplotlib", "Graphviz": "pygraphviz"}
    missing = [name for name, module in libraries.items() if not importlib.util.find_spec(module)]
    if "Graphviz" in missing and shutil.which("dot"):
        missing.remove("Graphviz")
    if missing:
        *some, last = missing
        names = " and ".join(filter(None, (", ".join(some), last)))
        msg = f"the demo needs {names}, not installed: pip install 'fxray[demo]'"
        raise fxray.MissingExtraError(msg)


def _runs_in(place: Path) -> int:
    try:
        return len(fxray.runs(place))
    except fxray.NotARunError:
        return 0


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread: the sums of two would differ in their last digits.

    A network this small is no slower for it, and much faster where other work goes on.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _saved(run: fxray.Run) -> str:
    """Return what was kept as a table, a row per op and kind; `print(run)` says more."""
    rows = [("op", "kind", "selection", "records", "steps", "shape")]
    seen = set()
    for kept in run.captures():
        if (kept.op, kept.kind) not in seen and kept.parameter in ("", "weight"):
            seen.add((kept.op, kept.kind))
            shape = "×".join(map(str, kept.shape)) or "a number"
            rows.append((kept.op, kept.kind, kept.selection, str(kept.records), kept.steps, shape))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"  logged: {', '.join(run.log)}"])


def _draw(run: fxray.Run, folder: Path) -> None:
    print(f"\nPictures, in {folder}:\n")
    width = max(len(picture.file) for picture in PICTURES)

    def say(file: str, words: str) -> None:
        print(f"  {file:{width}}  {words}", flush=True)

    say("graph.svg, .png", "the network, a badge for all that was to be kept")
    for suffix in ("svg", "png"):
        run.render(folder / f"saved.{suffix}", title="DigitNet: what was kept")
    say("saved.svg, .png", "the same with how often it was")
    for picture in PICTURES:
        picture.draw(run).savefig(folder / picture.file, dpi=120)
        say(picture.file, picture.words)


def _say_where(run: fxray.Run, place: Path) -> None:
    typed, command = shlex.quote(str(place)), _command()
    print(
        f"""
The numbers are in {place}, run {run.id}. Look further:

  {command} runs {typed}
  {command} show {typed} relu --kind output --step 40
  {command} plot {typed} relu_1 --kind output --step 40
  {command} render {typed} -o net.svg

or in Python:

  import fxray
  run = fxray.open("{place.as_posix()}")
  run["relu"].output[40]            # a numpy array: what F.relu gave at step 40"""
    )


def _command() -> str:
    """Return what to type for this command: where it stands, if the shell does not find it."""
    beside = Path(sys.executable).with_name("fxray")
    if shutil.which("fxray") or not beside.exists():
        return "fxray"
    near = os.path.relpath(beside)
    return shlex.quote(near if len(near) < len(str(beside)) else str(beside))
