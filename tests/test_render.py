"""The picture of an architecture: golden DOT texts, folding, hostile names, files."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import graphviz
import pytest

from fxray.errors import DraftError, MissingExtraError, PictureError, UnknownNameError
from fxray.look import render
from fxray.look.fold import READABLE, chain, fold
from fxray.look.labels import shorten
from fxray.look.render import engine, save, svg, to_dot
from tests.drawn_architectures import (
    Sketch,
    flat,
    hostile,
    residual_net,
    small_cnn,
    transformer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fxray.architecture import Architecture

PICTURES = Path(__file__).parent / "pictures"

needs_graphviz = pytest.mark.skipif(
    engine() is None, reason="no Graphviz: neither `dot` on PATH nor pygraphviz"
)

BEFORE = {"conv1": {"weight": "", "output": ""}, "relu": {"output": "", "grad": ""}}
AFTER = {
    "conv2d-0": {"weight": "×12", "weight_grad": "×12", "input": "×3"},
    "relu": {"output": "×120", "grad": "×120"},
}

GOLDEN: dict[str, Callable[[], graphviz.Digraph]] = {
    "cnn": lambda: to_dot(small_cnn()),
    "cnn-before": lambda: to_dot(small_cnn(), BEFORE),
    "cnn-after": lambda: to_dot(small_cnn(), AFTER, title="baseline", shapes=False),
    "residual": lambda: to_dot(residual_net()),
    "transformer-folded": lambda: to_dot(
        transformer(), {f"blocks.{n}.mlp.gelu": {"output": "×4"} for n in range(12)}
    ),
    "hostile": lambda: to_dot(hostile()),
}


def boxes(dot: graphviz.Digraph) -> list[str]:
    return re.findall(r"^\s*(box\d+) \[", dot.source, flags=re.MULTILINE)


def edges(dot: graphviz.Digraph) -> list[tuple[str, str]]:
    return re.findall(r"^\s*(\w+) -> (\w+)", dot.source, flags=re.MULTILINE)


@pytest.mark.parametrize("name", GOLDEN)
def test_dot_text_is_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    source = GOLDEN[name]().source
    kept = PICTURES / f"{name}.dot"
    if request.config.getoption("--overwrite-pictures"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(source, encoding="utf-8")
    assert kept.read_text(encoding="utf-8") == source, "see --overwrite-pictures"


def test_the_same_architecture_gives_the_same_text() -> None:
    again = type(residual_net()).from_dict(residual_net().to_dict())
    assert to_dot(again).source == to_dot(residual_net()).source


# Badges


def signs(dot: graphviz.Digraph) -> list[str]:
    return re.findall(r'fixedsize="true"[^>]*><font[^>]*><b>([^<]*)</b>', dot.source)


def test_badges_say_what_will_be_kept_and_what_was() -> None:
    assert not signs(to_dot(small_cnn()))
    legend, before = ["W", "O", "G"], ["W", "O", "O", "G"]
    assert signs(to_dot(small_cnn(), BEFORE)) == legend + before
    after = ["W ×12", "dW ×12", "I ×3", "O ×120", "G ×120"]
    assert signs(to_dot(small_cnn(), AFTER)) == ["W", "O", "G", "dW", "I", *after]


def test_badges_of_a_folded_module_are_counted() -> None:
    marks = {f"blocks.0.mlp.{name}": {"output": ""} for name in ("fc1", "gelu")}
    assert signs(to_dot(transformer(2), marks, depth=0)) == ["O", "O 2 ops"]


def test_badges_for_what_is_not_there_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="nearest: 'conv1'"):
        to_dot(small_cnn(), {"conv11": {"output": ""}})
    with pytest.raises(DraftError, match=r"no kind of capture 'outputs'.*weight_grad"):
        to_dot(small_cnn(), {"conv1": {"outputs": ""}})


# Words


def test_settings_are_cut_between_two_and_names_in_the_middle() -> None:
    net = Sketch("Long")
    words = "8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False"
    x = net.module("conv", "Conv2d", net.input("x", 1), settings=words, weight=(1,))
    x = net.add("encoder_" * 8, "relu", x)
    source = to_dot(net.build(x)).source
    assert ">8, 8, kernel_size=(3, 3), stride=(1, 1), …<" in source
    assert f">{shorten('encoder_' * 8)}<" in source
    assert words in source  # the tooltip has all of it


# Edges


def test_a_tensor_used_twice_has_two_arrows() -> None:
    dot = to_dot(small_cnn())
    assert edges(dot).count(("box5", "box6")) == 2
    assert len(edges(dot)) == 9 + 1  # one more to the output


def test_many_uses_are_one_arrow_with_a_number() -> None:
    dot = to_dot(hostile())
    assert edges(dot).count(("box2", "box3")) == 1
    assert "×5" in dot.source


def test_what_the_model_returns_is_marked() -> None:
    net = Sketch("Two")
    x = net.input("x", 2)
    a, b = net.add("relu", "relu", x, shape=(2,)), net.add("abs", "abs", x, shape=(2,))
    assert edges(to_dot(net.build(a, b)))[-2:] == [("box1", "output"), ("box2", "output")]


# Folding


def test_a_list_of_blocks_is_a_module_although_it_is_never_called() -> None:
    op = transformer(1)["blocks.0.attn.q"]
    assert chain(op) == ("blocks", "blocks.0", "blocks.0.attn")


@pytest.mark.parametrize(("depth", "count"), [(0, 8), (1, 19), (2, 79), (3, 187), (9, 187)])
def test_depth_says_how_many_levels_are_open(depth: int, count: int) -> None:
    assert len(boxes(to_dot(transformer(), depth=depth))) == count


def test_a_folded_module_is_one_box_that_says_so() -> None:
    source = to_dot(residual_net(), depth=1).source
    assert "<b>layer2.0</b></font><font" in source
    assert "·  BasicBlock · 9 ops" in source


def test_every_op_stands_in_one_box_at_every_depth() -> None:
    net = residual_net()
    for depth in range(4):
        folded = fold(net, depth)
        assert [op.path for box in folded.boxes for op in box.ops if box.ops]
        assert sorted(op.path for box in folded.boxes for op in box.ops) == sorted(net)
        assert all(net[p] in folded.boxes[n].ops for p, n in folded.places.items())


def test_a_second_call_of_a_module_has_its_own_frame() -> None:
    net = Sketch("Shared")
    x = net.input("x", 2)
    net.modules["block"] = "Block"
    for call in ("block", "block@1"):
        x = net.add(f"{call}.relu", "relu", x, scope=(call,), shape=(2,))
        x = net.add(f"{call}.tanh", "tanh", x, scope=(call,), shape=(2,))
    source = to_dot(net.build(x)).source
    assert source.count("subgraph cluster_") == 2
    assert "<b>block@1</b>" in source
    assert source.count(">  Block<") == 2
    assert len(boxes(to_dot(net.build(x), depth=0))) == 3


def test_a_negative_depth_is_refused() -> None:
    with pytest.raises(DraftError, match="depth=-1"):
        to_dot(small_cnn(), depth=-1)


@pytest.mark.parametrize("net", [transformer(200), flat(3000)], ids=["blocks", "flat"])
def test_thousands_of_ops_are_tens_of_boxes(net: Architecture, tmp_path: Path) -> None:
    assert len(net) > 3000
    begun = time.perf_counter()
    dot = to_dot(net)
    assert 5 <= len(boxes(dot)) <= READABLE
    if engine():
        save(dot, tmp_path / "net.svg")
    assert time.perf_counter() - begun < 30  # it takes one; layout of all would take minutes


# Hostile names


def test_node_ids_never_hold_a_colon() -> None:
    for name, make in GOLDEN.items():
        bodies = re.sub(r'"(?:[^"\\]|\\.)*"|<<.*>>|<<font.*>', "", make().source)
        assert ":" not in bodies, name


@needs_graphviz
@pytest.mark.dot
def test_hostile_names_come_out_as_they_are() -> None:
    root = ElementTree.fromstring(svg(to_dot(hostile(), {"relu-0": {"output": "<&>"}})))
    words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {'<b>A & "B"</b>', 'a<b>&"c":d', "node:n\\N->m", "</td>"} <= set(words)
    assert "O <&>" in words
    assert 'mode="<table>" & {x|y}' in words
    assert all(len(word or "") < 50 for word in words)
    tips = [
        value
        for e in root.iter()
        for key, value in e.attrib.items()
        if key == "{http://www.w3.org/1999/xlink}title"
    ]
    assert any("name" * 40 in tip for tip in tips)
    assert any("node:n\\N->m" in tip for tip in tips)


# Files


@needs_graphviz
@pytest.mark.dot
@pytest.mark.parametrize(
    ("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_save_writes_what_the_suffix_says(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = save(to_dot(small_cnn()), tmp_path / "new" / f"net.v2.{suffix.upper()}")
    assert path.read_bytes().startswith(start)
    path = save(to_dot(small_cnn()), tmp_path / "picture", format=suffix)
    assert path.read_bytes().startswith(start)


@needs_graphviz
@pytest.mark.dot
def test_svg_is_an_element_for_a_page() -> None:
    text = svg(to_dot(small_cnn()))
    assert text.startswith("<svg")
    assert "conv1" in text


@pytest.mark.parametrize("suffix", ["dot", "gv"])
def test_dot_needs_no_graphviz(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "engine", lambda: None)
    dot = to_dot(small_cnn())
    path = save(dot, str(tmp_path / f"net.{suffix}"))
    assert path.read_text(encoding="utf-8") == dot.source


@pytest.mark.parametrize("name", ["net.bmp", "net", "net.svg.txt"])
def test_another_suffix_is_refused_and_the_legal_ones_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=rf"'{name}'.*\.svg, \.png, \.pdf, \.dot"):
        save(to_dot(small_cnn()), tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(PictureError, match=r"format 'bmp'"):
        save(to_dot(small_cnn()), tmp_path / "net.svg", format="bmp")


def test_without_graphviz_the_source_is_left_and_the_way_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "engine", lambda: None)
    dot = to_dot(small_cnn())
    with pytest.raises(MissingExtraError) as caught:
        save(dot, tmp_path / "net.svg")
    left = tmp_path / "net.svg.dot"
    assert "pip install 'fxray[dot]'" in str(caught.value)
    assert str(left) in str(caught.value)
    assert left.read_text(encoding="utf-8") == dot.source
    with pytest.raises(MissingExtraError, match="pip install"):
        svg(dot)


@needs_graphviz
@pytest.mark.dot
def test_what_graphviz_cannot_read_is_an_error_not_a_broken_picture(tmp_path: Path) -> None:
    broken = graphviz.Digraph()
    broken.node("a", label="<<b>not closed>")
    with pytest.raises(PictureError, match=r"Graphviz failed: .*suffix \.dot"):
        save(broken, tmp_path / "net.svg")
    assert not list(tmp_path.iterdir())


def test_a_layout_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(command: list[str], **_: object) -> Mapping[str, str]:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(render, "engine", lambda: "dot")
    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(PictureError, match="depth="):
        save(to_dot(small_cnn()), tmp_path / "net.svg")


@needs_graphviz
@pytest.mark.dot
def test_drawing_says_nothing_on_the_terminal(tmp_path: Path) -> None:
    code = (
        "from tests.drawn_architectures import small_cnn\n"
        "from fxray.look.render import save, to_dot\n"
        f"save(to_dot(small_cnn()), {str(tmp_path / 'net.png')!r})\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
