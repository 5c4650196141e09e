"""Other libraries that see inside a model, each in a process of its own.

TorchLens puts wrappers around torch's functions at its first use and leaves them there, for whoever
shares its process to pass through. So each of these serves its steps from another
process, one at a time and asked for by the one that measures. A library that is not installed is
skipped, and says so. None is needed for anything else: `pip install torchlens nnsight`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import multiprocessing
import re
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import attrs
import torch
from torch import nn

from benchmarks.step_time import here
from benchmarks.ways import (
    Extraction,
    Graphs,
    Make,
    ModuleHooks,
    Runner,
    Task,
    runners,
    task,
    train,
)

__all__ = ["PEERS", "Peer", "Remote", "facts_of_torch"]


@attrs.frozen
class Peer:
    """A library that is measured beside fxray.

    Attributes:
        package: by which it is installed.
        make: makes the way to train with it.
        facts: tries what it may not be able to do; returns one line for each it cannot.
    """

    package: str
    make: Make
    facts: Callable[[Task], list[str]]


def _said(error: BaseException) -> str:
    """Return how an error begins."""
    lines = " ".join(str(error).split())
    text = re.split(r"[.;] | Explanation: ", lines, maxsplit=1)[0].rstrip(".")
    return f"{type(error).__name__}: {text}"


def _refusal(tried: str, run: Callable[[], object]) -> list[str]:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever it says is what is told
        return [f"{tried}: `{_said(error)}`"]
    return []


# TorchLens: every op, by wrappers around torch's functions


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    # Every op is every op: a batch norm counts its batches.
    return tensor.detach().mean() if tensor.is_floating_point() else tensor.detach().clone()


def _torchlens(task: Task, way: str) -> Runner:
    torchlens: Any = importlib.import_module("torchlens")
    every_op: dict[str, Any] = {
        "default_op": True,
        "default_module": False,
        "save_grads": True,
        "activation_transform": _mean,
        "save_raw_activations": False,
        "grad_transform": _mean,
        "save_raw_gradients": False,
        "return_output": True,
    }
    recording: Any = None

    def forward(x: torch.Tensor) -> Any:
        nonlocal recording
        out, recording = torchlens.record(task.model, x, **every_op)
        return out

    def kept() -> dict[tuple[str, str], list[Any]]:
        outputs = [record.transformed_ram_payload for record in recording.records]
        grads = [record.transformed_ram_payload for record in recording.grad_records]
        return {("", "output"): outputs, ("", "grad"): grads}

    def backward(loss: torch.Tensor) -> None:
        recording.log_backward(loss)

    step = train(forward, task.model, task.x, task.y, backward)
    step()
    return Runner(way, step, len(recording.records), kept)


def _torchlens_facts(task: Task) -> list[str]:
    torchlens: Any = importlib.import_module("torchlens")
    trackers: Any = importlib.import_module("torchlens.trackers")

    def watch(**asked: Any) -> None:
        trackers.watch(task.model, to=None, select=("0",), example_input=task.x, **asked)

    graphs = Graphs("eager")
    compiled = torch.compile(task.model, backend=graphs)
    recording = torchlens.record(compiled, task.x, default_op=True, default_module=False)
    recorded = len(recording.records)
    return [
        *_refusal(
            "a watcher of ops in a training loop", lambda: watch(grain="op", signals=("gradients",))
        ),
        *_refusal(
            "a watcher of the gradients of outputs", lambda: watch(signals=("activation_grads",))
        ),
        f"a compiled model: {recorded} ops recorded in eager, {graphs.compiled} graphs compiled",
    ]


# nnsight: modules, by hooks around a block of Python


def _order(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Return the paths of the modules that have none inside, in the order they run."""
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: seen.append(path))
        for path, module in model.named_modules()
        if not any(module.children())
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def _nnsight(task: Task, way: str) -> Runner:
    nnsight: Any = importlib.import_module("nnsight")
    paths = _order(task.model, task.x)
    net = nnsight.NNsight(task.model)
    places = [net.get(path) for path in paths]
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1e-3)
    last: dict[str, list[Any]] = {}
    nothing: Any = list  # whose instances nnsight gives a method `save` while it traces

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with net.trace(task.x):
            means, seen = nothing().save(), []
            for place in places:
                seen.append(place.output)
                means.append(seen[-1].detach().mean())
            loss = nn.functional.cross_entropy(net.output, task.y)
            grads = nothing().save()
            with loss.backward():
                for output in reversed(seen):
                    grads.append(output.grad.mean())
        optimizer.step()
        last.update(output=means, grad=grads[::-1])
        return torch.zeros(())  # what is not saved is gone with the trace; nobody asks for the loss

    step()

    def kept() -> dict[tuple[str, str], list[Any]]:
        return {
            (path, kind): [values[place]]
            for kind, values in last.items()
            for place, path in enumerate(paths)
        }

    return Runner(way, step, len(paths), kept)


def _nnsight_facts(task: Task) -> list[str]:
    nnsight: Any = importlib.import_module("nnsight")
    paths = _order(task.model, task.x)

    def out_of_order() -> None:
        net = nnsight.NNsight(task.model)
        first, second = net.get(paths[0]), net.get(paths[1])
        with net.trace(task.x):
            second.output.mean().save()
            first.output.mean().save()

    def compiled(*, fullgraph: bool) -> Graphs:
        torch.compiler.reset()
        graphs = Graphs("eager")
        net = nnsight.NNsight(torch.compile(task.model, backend=graphs, fullgraph=fullgraph))
        first = net.get(f"_orig_mod.{paths[0]}")
        with net.trace(task.x):
            first.output.mean().save()
        return graphs

    pieces = compiled(fullgraph=False).compiled
    return [
        *_refusal("outputs in another order than they run", out_of_order),
        *_refusal("`torch.compile(fullgraph=True)`", lambda: compiled(fullgraph=True)),
        f"compiled without `fullgraph`: {pieces} graphs for one module's output",
    ]


PEERS = {
    "TorchLens": Peer("torchlens", _torchlens, _torchlens_facts),
    "nnsight": Peer("nnsight", _nnsight, _nnsight_facts),
}
"""The libraries, by name."""


# What torch's own means cannot do


class _Branch(nn.Module):
    """Asks a number of its input which way to go."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, turned round where its sum is above zero."""
        return -x if x.sum() > 0 else x


def facts_of_torch(make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> dict[str, list[str]]:
    """Return by peer what hooks and extraction cannot do, tried on the model that `make` makes."""

    def hooked(*, lean: bool) -> None:
        model, x = make()
        ModuleHooks(model, torch.mean, lean=lean)
        torch.compile(model, backend="eager", fullgraph=True)(x)

    def branch() -> None:
        Extraction(_Branch())

    fullgraph = "`torch.compile(fullgraph=True)`"
    try:
        return {
            "hooks": _refusal(fullgraph, lambda: hooked(lean=False)),
            "lean hooks": _refusal(fullgraph, lambda: hooked(lean=True)),
            "extraction": _refusal("a branch on a number", branch),
        }
    finally:
        torch.compiler.reset()


# The other process


@attrs.define(eq=False)
class Remote:
    """A peer's way to train a model, in a process of its own; a context manager.

    Attributes:
        name: of the peer.
        sites: how many places keep an output and a gradient.
        version: of its package.
        skipped: why there is nothing to measure, empty where there is.
    """

    name: str
    model: str
    sites: int = 0
    version: str = ""
    skipped: str = ""
    _pipe: Connection | None = None
    _process: Any = None

    def __enter__(self) -> Remote:  # noqa: PYI034 - it is
        package = PEERS[self.name].package
        try:
            self.version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            self.skipped = f"not installed: pip install {package}"
            return self
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self.name, self.model), daemon=True
        )
        self._process.start()
        theirs.close()
        return self

    def wait(self) -> None:
        """Wait until it is warmed up, or says why it cannot be."""
        if not self.skipped:
            self.sites, self.skipped = self._ask()

    def _ask(self, asked: str = "") -> Any:
        assert self._pipe is not None
        if asked:
            self._pipe.send(asked)
        try:
            return self._pipe.recv()
        except EOFError:
            return 0, "its process ended"

    def __call__(self) -> tuple[float, float]:
        """Train a step; return its seconds, wall and processor, as its process measured them."""
        wall, cpu = self._ask("step")
        return wall, cpu

    def bare(self) -> tuple[float, float]:
        """Train a step of the same model in the same process without it; return the same."""
        wall, cpu = self._ask("bare")
        return wall, cpu

    def facts(self) -> list[str]:
        """Return what it cannot do, as tried in its process."""
        return [*self._ask("facts")]

    def kept(self) -> dict[tuple[str, str], list[float]]:
        """Return what it kept in its last step."""
        return dict(self._ask("kept"))

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._process.join(10)
            if self._process.is_alive():
                self._process.terminate()


def _functions() -> dict[str, Any]:
    """Return torch's own functions as they are now, by name."""
    places = {"": torch, "functional.": nn.functional, "Tensor.": torch.Tensor}
    return {
        prefix + name: value
        for prefix, place in places.items()
        for name, value in vars(place).items()
        if callable(value)
    }


def _left_behind(before: dict[str, Any]) -> list[str]:
    now = _functions()
    replaced = sum(now.get(name) is not value for name, value in before.items())
    return [f"functions of torch that it leaves replaced: {replaced}"] if replaced else []


def _serve(pipe: Connection, name: str, model: str) -> None:
    """Answer what is asked through `pipe`, until it is closed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    peer = PEERS[name]
    try:
        with contextlib.ExitStack() as stack:
            before = _functions()
            runner = stack.enter_context(runners(model, [name], makers={name: peer.make}))[name]
            runner.warm_up(3)
            bare = stack.enter_context(runners(model, ["bare"]))["bare"]
            bare.warm_up()
            pipe.send((runner.sites, ""))
            while True:
                match pipe.recv():
                    case "step":
                        pipe.send(here(runner.step)())
                    case "bare":
                        pipe.send(here(bare.step)())
                    case "kept":
                        pipe.send({k: [float(v) for v in vs] for k, vs in runner.kept().items()})
                    case "facts":
                        facts = peer.facts(task(model, stack))
                        pipe.send([*facts, *_left_behind(before)])
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - it is a reason to leave it out, and told
        pipe.send((0, _said(error)))
