"""An architecture as Graphviz DOT text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import graphviz

from fxray.errors import DraftError
from fxray.look.fold import Fold, fold, module_path
from fxray.look.labels import (
    BADGES,
    INK,
    MUTED,
    box_label,
    count,
    legend,
    look_of,
    shorten,
    text,
)

if TYPE_CHECKING:
    from fxray.architecture import Architecture, Op
    from fxray.look.fold import Box

__all__ = ["to_dot"]

Badges = Mapping[str, Mapping[str, str]]

_FONT = "Helvetica,Arial,sans-serif"
_GREYS = ("#f6f8fa", "#eef1f4")
_MANY_SLOTS = 3
_TOOLTIP_OPS = 12


def to_dot(
    architecture: Architecture,
    badges: Badges | None = None,
    *,
    title: str = "",
    depth: int | None = None,
    shapes: bool = True,
) -> graphviz.Digraph:
    """Return the picture of `architecture`, from its inputs at the top to its outputs.

    Args:
        architecture: what is drawn.
        badges: by op (path, type key or node name) and kind (`"weight"`, `"output"`,
            `"grad"`, `"weight_grad"`, `"input"`), what to print beside the badge: `""`
            for what will be kept, `"×12"` for what was.
        title: heading; the model's class name when empty.
        depth: how many levels of modules are drawn open; a module below is one box. With
            None it is chosen so that at most some tens of boxes are left.
        shapes: whether every box shows the shape of its output.

    Returns:
        A `graphviz.Digraph` whose `source` is the same text whenever the architecture
        and the badges are.

    Raises:
        DraftError: a badge of a kind that does not exist, or a negative depth.
        UnknownNameError: a badge for an op that is not in `architecture`.
    """
    if depth is not None and depth < 0:
        msg = f"depth={depth} opens fewer levels of modules than none; give 0 or more."
        raise DraftError(msg)
    marks = _checked(architecture, badges or {})
    folded = fold(architecture, depth)
    dot = graphviz.Digraph("fxray")
    _style(dot)
    kinds = [kind for kind in BADGES if any(kind in kinds for kinds in marks.values())]
    dot.attr("graph", label=_heading(architecture, folded, title, kinds))
    _cluster(dot, architecture, folded, marks, shapes=shapes)
    _edges(dot, architecture, folded)
    _outputs(dot, architecture, folded)
    return dot


def _checked(architecture: Architecture, badges: Badges) -> dict[str, Mapping[str, str]]:
    for name, kinds in badges.items():
        for kind in kinds:
            if kind not in BADGES:
                known = ", ".join(BADGES)
                msg = f"no kind of capture {kind!r} (badge of {name!r}); there are {known}."
                raise DraftError(msg)
    return {architecture.resolve(name): kinds for name, kinds in badges.items() if kinds}


def _style(dot: graphviz.Digraph) -> None:
    dot.attr(
        "graph",
        rankdir="TB",
        labelloc="t",
        labeljust="l",
        fontname=_FONT,
        fontcolor=INK,
        nodesep="0.3",
        ranksep="0.32",
        pad="0.2",
        bgcolor="white",
    )
    dot.attr("node", shape="plain", fontname=_FONT, fontcolor=INK)
    dot.attr(
        "edge",
        color="#6e7781",
        fontname=_FONT,
        fontsize="9",
        fontcolor=MUTED,
        arrowsize="0.6",
        penwidth="1.1",
    )


def _heading(architecture: Architecture, folded: Fold, title: str, kinds: list[str]) -> str:
    summary = f"{len(architecture):,} ops · {count(architecture.parameter_count)} parameters"
    if any(box.folded for box in folded.boxes):
        summary += f" · folded at depth {folded.depth}"
    if any(not box.folded and look_of(box).dashed for box in folded.boxes):
        summary += " · dashed: not a module"
    return legend(shorten(title or architecture.model, 72), summary, kinds)


def _cluster(
    dot: graphviz.Digraph,
    architecture: Architecture,
    folded: Fold,
    marks: Mapping[str, Mapping[str, str]],
    *,
    shapes: bool,
) -> None:
    """Draw every box inside the clusters of its chain, each cluster where it first runs."""
    tree = _Branch(())
    for number, box in enumerate(folded.boxes):
        tree.at(box.chain).boxes.append((number, box))
    numbers = {branch.chain: n for n, branch in enumerate(tree.all())}

    def draw(into: graphviz.Digraph, branch: _Branch) -> None:
        for number, box in branch.boxes:
            label = box_label(box, architecture.modules, _together(box, marks), shapes=shapes)
            into.node(f"box{number}", label=label, tooltip=_tooltip(box, architecture))
        for inner in branch.inner.values():
            with into.subgraph(name=f"cluster_{numbers[inner.chain]}") as sub:
                _frame(sub, architecture, inner.chain)
                draw(sub, inner)

    draw(dot, tree)


class _Branch:
    """A module call that is drawn open: its own boxes and the calls inside it."""

    def __init__(self, chain: tuple[str, ...]) -> None:
        self.chain = chain
        self.boxes: list[tuple[int, Box]] = []
        self.inner: dict[str, _Branch] = {}

    def at(self, chain: tuple[str, ...]) -> _Branch:
        branch = self
        for call in chain:
            branch = branch.inner.setdefault(call, _Branch((*branch.chain, call)))
        return branch

    def all(self) -> list[_Branch]:
        return [self, *(found for inner in self.inner.values() for found in inner.all())]


def _frame(sub: graphviz.Digraph, architecture: Architecture, chain: tuple[str, ...]) -> None:
    call = chain[-1]
    kind = architecture.modules.get(module_path(call), "")
    name = text(shorten(call, 40), size=10, color=INK, bold=True)
    words = f"{name}{text('  ' + shorten(kind, 32))}" if kind else name
    sub.attr(
        "graph",
        label=f"<{words}>",
        tooltip=_plain(" · ".join(filter(None, (call, kind)))),
        style="rounded,filled",
        fillcolor=_GREYS[len(chain) % 2],
        color="#d0d7de",
        labeljust="l",
        margin="10",
    )


def _together(box: Box, marks: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the badges of `box`: those of its op, or how many of its ops have each."""
    found = [marks[op.path] for op in box.ops if op.path in marks]
    if not box.folded:
        return dict(found[0]) if found else {}
    held = {kind: sum(kind in kinds for kinds in found) for kind in BADGES}
    return {kind: f"{n} op{'s' if n > 1 else ''}" for kind, n in held.items() if n}


def _tooltip(box: Box, architecture: Architecture) -> str:
    if box.folded:
        names = [op.path for op in box.ops[:_TOOLTIP_OPS]]
        rest = len(box.ops) - len(names)
        kind = architecture.modules.get(module_path(box.call), "")
        head = " · ".join(filter(None, (box.call, kind, f"{len(box.ops)} ops")))
        return _plain("\n".join([head, *names, *([f"and {rest} more"] if rest else [])]))
    op = box.ops[0]
    lines = [f"{op.path}  ({op.key})", op.target, op.settings]
    lines += [f"{name}: {spec}" for name, spec in op.parameters.items()]
    lines += [
        f"output {item}: {spec}" if item else f"output: {spec}"
        for item, spec in zip(op.items, op.outputs, strict=False)
    ]
    return _plain("\n".join(filter(None, [*lines, op.where])))


def _edges(dot: graphviz.Digraph, architecture: Architecture, folded: Fold) -> None:
    joined: dict[tuple[int, int], list[tuple[Op, Op, str]]] = {}
    for tail, head, slots in architecture.graph.edges(data="slots"):
        places = folded.places[tail], folded.places[head]
        if places[0] != places[1]:
            pair = architecture[tail], architecture[head]
            joined.setdefault(places, []).extend((*pair, slot) for slot in slots)
    for (start, end), uses in joined.items():
        ends = f"box{start}", f"box{end}"
        said = "\n".join(_use(*use) for use in uses[:_TOOLTIP_OPS])
        if folded.boxes[start].folded or folded.boxes[end].folded:
            tensors = len({one.path for one, _, _ in uses})
            _edge(dot, ends, said, f"{tensors} tensors" if tensors > 1 else "")
        elif len(uses) > _MANY_SLOTS:
            _edge(dot, ends, said, f"×{len(uses)}")
        else:
            for use in uses:
                _edge(dot, ends, _use(*use), "")


def _use(tail: Op, head: Op, slot: str) -> str:
    shapes = ", ".join(map(str, tail.outputs))
    return f"{tail.path} → {head.path} [{slot}]" + (f"\n{shapes}" if shapes else "")


def _edge(dot: graphviz.Digraph, ends: tuple[str, str], tooltip: str, label: str) -> None:
    said = {"tooltip": _plain(tooltip), "edgetooltip": _plain(tooltip)}
    if label:
        said |= {"label": _plain(label), "labeltooltip": _plain(tooltip)}
    dot.edge(*ends, **said)


def _outputs(dot: graphviz.Digraph, architecture: Architecture, folded: Fold) -> None:
    """Mark what the model returns by an arrow to a node of its own."""
    returned = [path for path in architecture.returns.get("", ()) if path in folded.places]
    if not returned:
        return
    dot.node(
        "output",
        label="output",
        shape="box",
        style="rounded,filled",
        fillcolor="#24292f",
        color="#24292f",
        fontcolor="white",
        fontsize="12",
        height="0.3",
        margin="0.12,0.04",
        tooltip=_plain("\n".join(["what the model returns", *returned])),
    )
    for box in dict.fromkeys(folded.places[path] for path in returned):
        inside = [path for path in returned if folded.places[path] == box]
        _edge(dot, (f"box{box}", "output"), "\n".join(f"{path} → output" for path in inside), "")


def _plain(words: str) -> str:
    """Return `words` such that Graphviz reads neither backslashes nor HTML in them."""
    return str(graphviz.escape(words)).replace("\n", r"\n")
