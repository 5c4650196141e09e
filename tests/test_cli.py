"""The `fxray` command: what each sub-command prints, and how it says what is wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxray
from fxray.cli import main
from fxray.cli.entry import COMMANDS
from fxray.cli.text import print_table, statistics

ROOT = Path(__file__).resolve().parents[1]

Shell = Callable[..., tuple[int, str, str]]
"""What words the command is given, to its status, stdout and stderr."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(F.relu(self.conv1(x)).flatten(1))
        return hidden


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with two runs; the second of 30 steps, two epochs, two phases."""
    place = tmp_path_factory.mktemp("cli") / "runs"
    torch.manual_seed(0)
    batches = [torch.randn(5, 1, 6, 6) for _ in range(15)]
    model = Net()
    xray = fxray.trace(model, batches[0])
    xray.draft.clear()
    xray.mark(F.relu, output=True, every=5)
    xray.mark(F.relu, grad=True, selection=fxray.Stats())
    xray.mark("conv1", weight=True, every=10)
    xray.mark("head", output=True, selection=fxray.Histogram(8))
    net = xray.rewrite()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for name, epochs in (("first", 1), ("second", 2)):
        with fxray.record(net, place, name=name, tags={"lr": 0.1}) as recorder:
            for _ in range(epochs):
                for x in recorder.epoch(batches):
                    loss = net(x).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    recorder.log(loss=loss)
                with torch.no_grad():
                    for x in recorder.phase("valid", batches[:1]):
                        net(x)
    return place


@pytest.fixture
def run_fxray(capsys: pytest.CaptureFixture[str]) -> Shell:
    """Give `main` as a shell sees it: status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def lines_of(answer: tuple[int, str, str]) -> list[str]:
    status, out, err = answer
    assert (status, err) == (0, "")
    return out.splitlines()


# What it prints


def test_runs_lists_them(run_fxray: Shell, place: Path) -> None:
    head, *rows = lines_of(run_fxray("runs", place))
    assert head.split()[:3] == ["run", "name", "model"]
    assert [row.split()[1:3] for row in rows] == [["first", "Net"], ["second", "Net"]]
    assert all("lr=0.1" in row for row in rows)


def test_show_prints_the_run(run_fxray: Shell, place: Path) -> None:
    assert lines_of(run_fxray("show", place)) == str(fxray.open(place)).splitlines()
    assert "'first'" in lines_of(run_fxray("show", place, "--run", "first"))[0]
    narrowed = "\n".join(lines_of(run_fxray("show", place, "--phase", "valid")))
    assert "phases valid;" in narrowed


def test_show_lists_the_records_of_a_layer(run_fxray: Shell, place: Path) -> None:
    lines = lines_of(run_fxray("show", place, "relu", "--kind", "output"))
    assert lines[0] == "relu output: 7 records, selected by NaturalSelection"
    assert lines[1].split() == ["step", "epoch", "batch", "phase", "shape"]
    assert [line.split() for line in lines[2:6]] == [
        ["0", "0", "0", "train", "5×4×4×4"],
        ["5", "0", "5", "train", "5×4×4×4"],
        ["10", "0", "10", "train", "5×4×4×4"],
        ["15", "0", "0", "valid", "5×4×4×4"],
    ]
    both = "\n".join(lines_of(run_fxray("show", place, "relu-0")))
    assert "relu output: 7 records" in both
    assert "relu grad: 30 records with fields count" in both


def test_a_long_table_is_cut_unless_all_is_asked_for(run_fxray: Shell, place: Path) -> None:
    words = ("show", place, "relu", "--kind", "grad", "--field", "norm")
    cut, whole = lines_of(run_fxray(*words)), lines_of(run_fxray(*words, "--all"))
    assert cut[-1] == "(14 rows left out; --all prints them)"
    assert len(whole) == 32
    norms = fxray.open(place)["relu"].grad.field("norm").to_numpy()
    assert whole[-1].split() == ["29", "1", "14", "train", f"{norms[-1]:.5g}"]


def test_show_prints_the_array_of_a_step(run_fxray: Shell, place: Path) -> None:
    lines = lines_of(run_fxray("show", place, "--step", "20", "relu", "--kind", "output"))
    kept = fxray.open(place)["relu"].output[20]
    assert lines[0] == "relu.output at step 20, epoch 1, batch 5, phase train"
    assert lines[1] == statistics(kept)
    assert lines[1].startswith("5×4×4×4 float32; min 0, mean ")
    assert lines[2].startswith("[[[[")


def test_show_prints_fields_and_single_numbers_of_a_step(run_fxray: Shell, place: Path) -> None:
    grad = lines_of(run_fxray("show", place, "relu", "--step", "7"))
    assert grad[0] == "relu.grad at step 7, epoch 0, batch 7, phase train"
    assert grad[1].split() == ["count", "320"]
    head = lines_of(run_fxray("show", place, "head", "--step", "7"))
    assert {"counts", "edges"} <= {line.partition(":")[0] for line in head}


def test_show_prints_one_of_several_forwards_of_a_step(run_fxray: Shell, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    xray = fxray.trace(model, torch.ones(2, 3))
    xray.mark("linear-0", output=True, selection=fxray.Mean())
    net = xray.rewrite()
    with fxray.record(net, tmp_path / "runs") as recorder, recorder.step():
        for scale in (1.0, 2.0):
            net(scale * torch.ones(2, 3))
    words = (
        "show",
        tmp_path / "runs",
        "linear-0",
        "--kind",
        "output",
        "--step",
        "0",
        "--call",
        "1",
    )
    mean = model(2 * torch.ones(2, 3)).mean().item()
    assert f"{mean:.4f}"[:6] in "\n".join(lines_of(run_fxray(*words)))


def test_show_prints_everything_of_a_step(run_fxray: Shell, place: Path) -> None:
    lines = lines_of(run_fxray("show", place, "--step", "10"))
    assert lines[0].split() == ["op", "kind", "field", "at", "step", "10"]
    rows = {tuple(line.split()[:2]) for line in lines[1:]}
    assert rows == {
        ("conv1", "weight"),
        ("conv1", "weight.bias"),
        ("relu", "output"),
        ("relu", "grad"),
        ("head", "output"),
    }


def test_show_prints_logged_numbers(run_fxray: Shell, place: Path) -> None:
    lines = lines_of(run_fxray("show", place, "loss", "--all"))
    assert lines[0] == "logged loss: 30 records"
    assert lines[1].split()[-1] == "value"
    assert len(lines) == 32


def test_render_draws_the_graph(run_fxray: Shell, place: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "net.dot"
    (line,) = lines_of(run_fxray("render", place, "-o", target, "--depth", "1"))
    assert line == f"{target}: the graph of run {fxray.open(place).id}"
    assert "O ×7" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "title"),
    [
        (["conv1"], "conv1.weight"),
        (["conv1", "--kind", "weight.bias"], "conv1.weight.bias"),
        (["conv1", "--steps", "0:30:10"], "conv1.weight"),
        (["relu", "--step", "20"], "relu.output"),
        (["relu", "--step", "7"], "relu.grad"),
        (["relu", "--phase", "valid", "--steps", "0:100"], "relu.output"),
        (["relu", "--kind", "grad", "--field", "norm"], "relu.grad.norm"),
        (["head"], "head.output"),
        (["loss"], "loss"),
    ],
)
def test_plot_draws_a_series(
    run_fxray: Shell,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    words: list[str],
    title: str,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (line,) = lines_of(run_fxray("plot", place, *words))
    assert line.startswith(f"{title}.png: {title} of run {fxray.open(place).id}")
    assert (tmp_path / f"{title}.png").read_bytes().startswith(b"\x89PNG")


def test_plot_writes_what_the_name_ends_in(run_fxray: Shell, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines_of(run_fxray("plot", place, "loss", "-o", tmp_path / "a" / "loss.svg"))
    assert "<svg" in (tmp_path / "a" / "loss.svg").read_text(encoding="utf-8")


def test_the_place_may_be_left_out(
    run_fxray: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)
    assert lines_of(run_fxray("runs")) == lines_of(run_fxray("runs", place))
    assert lines_of(run_fxray("show", "relu")) == lines_of(run_fxray("show", "runs", "relu"))
    monkeypatch.chdir(place)
    status, out, err = run_fxray("show", "--run", "second")
    assert (status, out) == (1, "")
    assert err == (
        "fxray: there is neither runs/ nor fxray-demo/runs/ here; "
        "name the folder, or make one: fxray demo\n"
    )


# A model of the user's own

USERS = """
    import random
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, hidden=8):
            super().__init__()
            self.first = nn.Linear(6, hidden)

        def forward(self, x, mask=None, scale=None):
            y = torch.relu(self.first(x))
            return y if mask is None else y * mask[:, None]

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)

        def forward(self, ids, seen=None):
            return self.embed(ids) if seen is None else self.embed(ids) * seen[..., None]

    class Branches(Net):
        def forward(self, x):
            return self.first(x) if x.sum() > 0 else x

    class Random(Net):
        def forward(self, x):
            return self.first(x) if torch.rand(()) > 0.5 else x

    net, x = Net(), torch.zeros(2, 6)

    def talks():
        print("made")
        return Net(), x

    def fails():
        return {}["missing"]

    class Holder:
        make = staticmethod(lambda: (Net(), (x, torch.ones(2))))

    alone = lambda: Net()
    by_name = lambda: (Net(), {"x": x})
    both = lambda: (Net(), (x,), {"mask": torch.ones(2)})
    pair = lambda: (Net(), ((x,), {"mask": torch.ones(2)}))
    needs = lambda width: Net(width)
    nothing = lambda: None
    a_class = lambda: Net
    many = lambda: (Net(), x, x)
    number = 3
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder of the user's own, with files that define models; leave none behind."""
    (tmp_path / "own_models.py").write_text(textwrap.dedent(USERS), encoding="utf-8")
    (tmp_path / "own_broken.py").write_text("import torch\nimport no_such_thing\n")
    (tmp_path / "own_syntax.py").write_text("\n\ndef f(:\n")
    (tmp_path / "own_script.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "inner.py").write_text("from . import nothing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def traced(answer: tuple[int, str, str]) -> list[str]:
    status, out, err = answer
    assert status == 0, err
    return out.splitlines()


def test_trace_prints_the_ops_and_the_report(run_fxray: Shell, users: Path) -> None:
    words = ("trace", "own_models.py:Net", "--input", "5x6", "--no-picture")
    lines = lines_of(run_fxray(*words))
    assert lines == [
        "Net of own_models.py:Net: 3 ops, 56 parameters",
        "",
        "op     key       output         parameters  settings                                  line",
        "x      input-0   float32[5, 6]",
        "first  linear-0  float32[5, 8]  56          in_features=6, out_features=8, bias=True  own_models.py:12",
        "relu   relu-0    float32[5, 8]                                                        own_models.py:12",
        "",
        "traced      by execution: the model ran on the input, and what it computed is a graph",
        "ops         3 in train mode, 3 in eval mode",
        "sizes       batch size free",
        "verified    bit-equal, gradients equal",
    ]
    assert lines_of(run_fxray(*words)) == lines


@pytest.mark.parametrize(
    ("name", "inputs", "shown"),
    [
        ("own_models:net", ["-i", "3x6"], "[3, 8]"),
        ("own_models.py:alone", ["-i", "3x6", "-i", "3"], "[3, 8]"),
        ("own_models.py:by_name", [], "[2, 8]"),
        ("own_models.py:both", [], "mask "),
        ("own_models.py:pair", [], "mask "),
        ("own_models:Holder.make", [], "mask "),
        ("own_models:Holder.make", ["-i", "x=7x6"], "[7, 8]"),
        ("./own_models.py:Words", ["-i", "ids=2x5:int64<10", "-i", "seen=2x5:bool"], "bool[2, 5]"),
        ("torch.nn:ReLU", ["-i", "2x3:float64"], "float64[2, 3]"),
        ("own_models:Net", [], "shapes are told and all is verified"),
    ],
)
def test_trace_takes_what_makes_a_model(
    run_fxray: Shell, users: Path, name: str, inputs: list[str], shown: str
) -> None:
    assert shown in "\n".join(traced(run_fxray("trace", name, *inputs, "--no-picture")))
    assert not [*users.glob("*.svg")]


def test_trace_answers_programs(run_fxray: Shell, users: Path) -> None:
    status, out, err = run_fxray("trace", "own_models.py:talks", "--json")
    assert (status, err) == (0, "made\n")
    told = json.loads(out)
    assert told["frontend"] == "execution"
    assert told["ops"] == {"train": 3, "eval": 3}
    assert told["reservations"] == []
    assert not [*users.glob("*.svg")]


def test_trace_draws(run_fxray: Shell, users: Path) -> None:
    lines = traced(run_fxray("trace", "own_models.py:talks", "-o", "new/net.dot", "--depth", "1"))
    assert lines[-1] == f"{Path('new') / 'net.dot'}: the graph of Net"
    drawn = Path("new", "net.dot").read_text(encoding="utf-8")
    assert "relu" in drawn
    assert "weights" not in drawn, "nothing is going to be kept"


@pytest.mark.dot
def test_trace_draws_to_the_callables_name(run_fxray: Shell, users: Path) -> None:
    assert traced(run_fxray("trace", "own_models.py:talks"))[-1] == "talks.svg: the graph of Net"
    assert "<svg" in Path("talks.svg").read_text(encoding="utf-8")


def test_trace_does_without_graphviz(
    run_fxray: Shell, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxray.look.render.engine", lambda: None)
    status, out, err = run_fxray("trace", "own_models.py:net", "-i", "2x6")
    assert status == 0
    assert "bit-equal" in out
    assert "warning: " in err
    assert "--no-picture" in err
    assert run_fxray("trace", "own_models.py:net", "-i", "2x6", "-o", "net.svg")[0] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("own_models.py", "own_models.py defines Net, Words, Branches, Random, talks, fails"),
        ("own_models.py:fails", "own_models.py:38: calling own_models.py:fails failed: KeyError"),
        ("own_models.py:needs", "takes width and is called with nothing; give them defaults"),
        ("own_models.py:nothing", "returned NoneType; it is to return model, (model, x)"),
        ("own_models.py:a_class", "returned the class Net; it is to return model"),
        ("own_models.py:many", "returned (Net, Tensor, Tensor); several arguments go in a tuple"),
        ("own_models.py:number", "is of type int; name a function"),
        ("own_models.py:Wrods", "own_models.py has no 'Wrods'; nearest: Words"),
        ("./own_models:Net", "there is no file ./own_models; there is own_models.py"),
        ("own_broken:f", "own_broken.py:2: importing own_broken failed: ModuleNotFoundError"),
        ("own_syntax.py:f", "own_syntax.py:3: importing own_syntax.py failed: SyntaxError"),
        ("own_script.py:f", "ended the program (sys.exit(3)); keep that below `if __name__`"),
        ("no_such.module:f", "is it installed here, or in this folder? A file is named no_such.py"),
        ("package/inner.py:f", "name it as one, package.module:CALLABLE"),
        ("own_models.py:Net -i 2x7", "own_models.py:12: tracing own_models.py:Net: Net itself"),
        ("own_models.py:Net -i 2x7", "(x float32[2, 7])"),
        ("own_models.py:Net -i 2x7", "; give it another with --input"),
        ("own_models.py:Net -i y=2x6", "missing a required argument: 'x'; give it another"),
        ("own_models.py:Branches", "Give one: --input SHAPE (of x)"),
        ("own_models.py:Branches", "own_models.py:25: tracing own_models.py:Branches: torch.fx"),
        ("own_models.py:Branches -i 2x6 --strict", "branch on data at own_models.py:25"),
        ("own_models.py:Branches -i 2x6 --strict", "without --strict this is told in the report"),
        ("own_models.py:Random -i 2x6 --frontend execution", "without --frontend the model runs"),
        ("own_models.py:Net --frontend interposed", "needs an input: --input SHAPE (of x)"),
        ("own_models.py:net -o net.gif", "end its name in .svg, .png, .pdf, .dot"),
    ],
)
def test_trace_says_what_is_wrong_in_one_line(
    run_fxray: Shell, users: Path, words: str, said: str
) -> None:
    status, out, err = run_fxray("trace", *words.split())
    assert (status, out) == (1, "")
    assert err.startswith("fxray: ")
    assert err.count("\n") == 1
    assert said in err


# What it says when something is wrong


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "PLACE", "rleu"], "nearest: 'relu'"),
        (["show", "PLACE", "flatten"], "nothing of 'flatten' was kept"),
        (["show", "PLACE", "relu", "--kind", "outptu"], "nearest: 'output'; it has output, grad"),
        (["show", "PLACE", "relu", "--field", "men"], "nearest: 'mean'"),
        (["show", "PLACE", "conv1", "--field", "mean"], "has no fields"),
        (["show", "PLACE", "relu", "--kind", "output", "--step", "7"], "nearest: 5, 10"),
        (["show", "PLACE", "relu", "--phase", "vaild"], "only in 'train', 'valid'"),
        (["show", "PLACE", "--phase", "vaild"], "it has train, valid"),
        (["show", "PLACE", "--kind", "output"], "name it: fxray show PLACE LAYER"),
        (["show", "PLACE", "--step", "999"], "nearest: 30"),
        (["show", "PLACE", "--run", "secnd"], "nearest: 'second'"),
        (["runs", "./nowhere"], "./nowhere holds no fxray runs"),
        (["plot", "PLACE"], "say which layer to draw; run"),
        (["plot", "PLACE", "relu", "--step", "7", "--kind", "output"], "nearest"),
        (["plot", "PLACE", "relu", "--steps", "100:200"], "it has 0 to 25"),
        (["plot", "PLACE", "relu", "-o", "relu.gif"], "end its name in .png, .svg, .pdf"),
        (["render", "PLACE", "-o", "net.gif"], "end its name in one of .svg"),
    ],
)
def test_an_error_is_one_line(run_fxray: Shell, place: Path, words: list[str], said: str) -> None:
    status, out, err = run_fxray(*(place if word == "PLACE" else word for word in words))
    assert (status, out) == (1, "")
    assert err.startswith("fxray: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shwo"], "no command 'shwo'; did you mean 'show'?"),
        (["--verson"], "unrecognized arguments: --verson; see: fxray --help"),
        (["show", "PLACE", "relu", "more"], "see: fxray show --help"),
        (["show", "--step", "four"], "--step: invalid int value: 'four'"),
        (["demo", "--epochs", "0"], "'0' is no whole number of at least 1"),
        (["trace", "m:f", "-i", "2xx"], "'2xx' describes no tensor; write 2x3x32x32"),
        (["trace", "m:f", "-i", "2:int46"], "no dtype 'int46' can be drawn; did you mean 'int64'?"),
        (["trace", "m:f", "-i", "2x3<4"], "write a dtype of them, as in '2x12:int64<100'"),
        (["plot", "PLACE", "relu", "--steps", "0:10:0"], "write 0:100, 0:100:10 or 0,50,100"),
    ],
)
def test_words_that_make_no_sense_are_status_2(
    run_fxray: Shell, place: Path, words: list[str], said: str
) -> None:
    status, out, err = run_fxray(*(place if word == "PLACE" else word for word in words))
    assert (status, out) == (2, "")
    assert err.startswith("fxray: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_file_that_cannot_be_written_is_one_line(
    run_fxray: Shell, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    status, _, err = run_fxray("render", place, "-o", tmp_path / "file" / "net.dot")
    assert status == 1
    assert err.startswith("fxray: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["plot", "PLACE", "relu"], ["render", "PLACE", "-o", "a.png"]])
def test_pictures_name_the_extra_that_is_missing(
    run_fxray: Shell,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fxray.look.picture", None)
    monkeypatch.setattr("fxray.look.render.engine", lambda: None)
    status, _, err = run_fxray(*(place if word == "PLACE" else word for word in words))
    assert status == 1
    assert "pip install 'fxray[plot]'" in err or "pip install 'fxray[dot]'" in err


def test_an_interrupt_is_no_traceback(run_fxray: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxray.cli.demo.demo", interrupted)
    assert run_fxray("demo") == (130, "", "fxray: interrupted\n")


# Help


def test_the_help_names_every_command(run_fxray: Shell) -> None:
    asked = lines_of(run_fxray("--help"))
    assert asked == lines_of(run_fxray())
    text = "\n".join(asked)
    assert "examples:" in text
    assert all(f"  {name} " in text and c.summary in text for name, c in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_parse(run_fxray: Shell, name: str) -> None:
    text = "\n".join(lines_of(run_fxray(name, "--help")))
    command = COMMANDS[name]
    assert command.summary in text
    assert "default" in text
    for line, words in command.examples:
        assert line in text
        assert words in text
        program, first, *rest = shlex.split(line)
        assert (program, first) == ("fxray", name)
        command.parse(rest)


def test_the_version_is_told(run_fxray: Shell) -> None:
    (line,) = lines_of(run_fxray("--version"))
    assert line.startswith("fxray 0.")
    assert f"torch {torch.__version__}" in line


# As a shell runs it


def test_as_a_process(place: Path) -> None:
    """A reader that goes away is no error to talk about."""
    command = [sys.executable, "-m", "fxray", "show", str(place), "relu", "--all"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


# Its tables


def test_a_terminal_gets_rich_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    print_table(["op", "empty", "kind"], [["a[b]", "", "output"]])
    out = capsys.readouterr().out
    assert "a[b]" in out
    assert "empty" not in out


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array(3), "3"),
        (np.zeros((0, 2), np.float32), "0×2 float32; 0 NaN"),
        (np.array([1, 2]), "2 int64; min 1, mean 1.5, max 2; 0 NaN"),
        (np.array([np.nan, np.nan]), "2 float64; 2 NaN"),
        (np.array([3 + 4j]), "1 complex128; magnitudes: min 5, mean 5, max 5; 0 NaN"),
    ],
)
def test_statistics_of_any_array(array: np.ndarray, said: str) -> None:
    assert statistics(array) == said
