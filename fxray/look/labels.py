"""The words inside a picture's boxes, as Graphviz HTML-like labels."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

import attrs

from fxray.look.fold import module_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxray.architecture import Op, TensorSpec
    from fxray.look.fold import Box

__all__ = ["BADGES", "INK", "MUTED", "Badge", "Look", "box_label", "legend", "look_of", "shorten"]

INK, MUTED = "#1f2328", "#59636e"

ACTIVATIONS = frozenset({
    "celu", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "leakyrelu", "log_softmax", "logsigmoid", "logsoftmax", "mish", "prelu",
    "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softmax", "softmin", "softplus",
    "softshrink", "softsign", "swish", "tanh", "tanhshrink", "threshold",
})  # fmt: skip
"""Op types drawn as activations, whether module, function or method."""


@attrs.frozen
class Badge:
    """How a kind of capture is shown: its sign, colours and words for the legend."""

    sign: str
    color: str
    ink: str
    words: str


# Okabe and Ito's colours: told apart under every common colour blindness; the sign in
# each badge tells them apart in grey.
BADGES: Mapping[str, Badge] = {
    "weight": Badge("W", "#0072B2", "white", "weights"),
    "output": Badge("O", "#009E73", "white", "output"),
    "grad": Badge("G", "#D55E00", "white", "gradient of the output"),
    "weight_grad": Badge("dW", "#CC79A7", INK, "gradient of the weights"),
    "input": Badge("I", "#E69F00", INK, "input"),
}


@attrs.frozen
class Look:
    """How a box is drawn: fill, border, border style and thickness."""

    fill: str
    border: str
    style: str = "rounded"
    thickness: int = 1

    @property
    def dashed(self) -> bool:
        """Whether its border says that no module was called."""
        return "dashed" in self.style


_LOOKS = {
    "weights": Look("#e3f0f9", "#0072B2"),
    "activation": Look("#fff3cc", "#c98a00", "rounded,dashed"),
    "activation module": Look("#fff3cc", "#c98a00"),
    "module": Look("#ffffff", "#8c959f"),
    "plain": Look("#ffffff", "#8c959f", "rounded,dashed"),
    "parameter": Look("#f7e6f0", "#b0578a"),
    "input": Look("#24292f", "#24292f"),
    "folded": Look("#e6e8eb", "#6e7781", thickness=2),
}


def look_of(box: Box) -> Look:
    """Return how `box` is drawn: calls of modules have full borders, functions dashed."""
    if box.folded:
        return _LOOKS["folded"]
    op = box.ops[0]
    if op.role in ("input", "parameter"):
        return _LOOKS[op.role]
    if op.type.lower() in ACTIVATIONS:
        return _LOOKS["activation module" if op.role == "module" else "activation"]
    if op.parameters:
        return _LOOKS["weights"]
    return _LOOKS["module" if op.role == "module" else "plain"]


def shorten(text: str, limit: int = 32) -> str:
    """Return `text` in one line of at most `limit` characters, cut in the middle.

    >>> shorten("encoder.layers.11.attention.self.query", 21)
    'encoder.la…self.query'
    """
    flat = re.sub(r"[\x00-\x20\x7f]+", " ", text).strip()
    if len(flat) <= limit:
        return flat
    head = limit // 2
    return f"{flat[:head]}…{flat[len(flat) - (limit - head - 1) :]}"


def text(words: str, *, size: int = 10, color: str = MUTED, bold: bool = False) -> str:
    """Return `words`, escaped, as one piece of an HTML-like label."""
    # Graphviz substitutes `\\N` by the node's id in HTML-like labels too.
    inner = html.escape(words).replace("\\", "\\\\")
    inner = f"<b>{inner}</b>" if bold else inner
    return f'<font point-size="{size}" color="{color}">{inner}</font>'


def count(number: int) -> str:
    """Return a number of parameters as a person would say it.

    >>> count(9_408), count(11_689_512)
    ('9,408', '11.7 M')
    """
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def sizes(spec: TensorSpec) -> str:
    """Return the shape of `spec`, e.g. `"2×8×28×28"`."""
    return "×".join(map(str, spec.shape)) or "scalar"


def box_label(
    box: Box, classes: Mapping[str, str], marks: Mapping[str, str], *, shapes: bool
) -> str:
    """Return the label of `box`, a table with a row of badges where there are `marks`.

    Args:
        box: what is labelled.
        classes: class name by module path.
        marks: what to print beside each kind's badge.
        shapes: whether the shape of the output is printed.
    """
    look = look_of(box)
    lines = _folded_lines(box, classes) if box.folded else _op_lines(box.ops[0])
    if shapes:
        lines += _shape_lines(box)
    rows = "".join(f"<tr><td>{_LEEWAY}{line}{_LEEWAY}</td></tr>" for line in lines)
    if marks:
        rows += f"<tr><td>{_badge_row(marks)}</td></tr>"
    return (
        f'<<table border="{look.thickness}" cellborder="0" cellspacing="0" cellpadding="2"'
        f' style="{look.style}" bgcolor="{look.fill}" color="{look.border}">{rows}</table>>'
    )


# A label is measured in this machine's font and read in another: space on either side.
_LEEWAY = '<font point-size="8">&#160;&#160;</font>'


def _op_lines(op: Op) -> list[str]:
    on_dark = op.role == "input"
    ink, muted = ("#ffffff", "#d0d7de") if on_dark else (INK, MUTED)
    name = shorten(op.path.rpartition(".")[2])
    kind = "" if op.type == name else f"  {text(shorten(op.type, 24), color=muted)}"
    lines = [text(name, size=12, color=ink, bold=True) + kind]
    if op.settings:
        lines.append(text(_settings(op.settings), size=9, color=muted))
    if op.parameters and op.role != "parameter":
        lines.append(text(f"{count(op.parameter_count)} parameters", size=9, color=muted))
    return lines


def _settings(words: str, limit: int = 44) -> str:
    """Return as many settings as fit: modules print what matters most first."""
    if len(words) <= limit:
        return shorten(words, limit)
    whole = words[:limit].rpartition(", ")[0]
    # Not inside a bracket: "(3, …" would read as a setting of its own.
    while whole.count("(") != whole.count(")"):
        whole = whole.rpartition(", ")[0]
    return f"{shorten(whole, limit)}, …" if whole else shorten(words, limit)


def _folded_lines(box: Box, classes: Mapping[str, str]) -> list[str]:
    ops = f"{len(box.ops):,} ops"
    if not box.call:
        first, last = (shorten(op.path, 20) for op in (box.ops[0], box.ops[-1]))
        name, kind = f"{first} … {last}", ops
    else:
        path = module_path(box.call)
        name = shorten(box.call if box.call != path else path)
        kind = " · ".join(filter(None, (shorten(classes.get(path, ""), 28), ops)))
    lines = [text(name, size=12, color=INK, bold=True) + text(f"  ·  {kind}")]
    parameters = {
        op.parameter_path(name): spec.numel
        for op in box.ops
        for name, spec in op.parameters.items()
    }
    if parameters:
        lines.append(text(f"{count(sum(parameters.values()))} parameters", size=9))
    return lines


def _shape_lines(box: Box) -> list[str]:
    op = box.ops[-1]
    if not op.outputs:
        return []
    color = "#d0d7de" if op.role == "input" and not box.folded else INK
    shown = "   ".join(sizes(spec) for spec in op.outputs[:3])
    return [text(shown + (" …" if len(op.outputs) > 3 else ""), color=color)]


def _badge_row(marks: Mapping[str, str]) -> str:
    kinds = [kind for kind in BADGES if kind in marks]
    cells = "".join(_pill(kind, marks[kind]) for kind in kinds)
    # Fixed too: stretched to the box's width, its pills would stand far apart.
    width = 3 + sum(3 + _pill_width(_pill_words(kind, marks[kind])) for kind in kinds)
    return (
        f'<table border="0" cellborder="0" {_TIGHT} fixedsize="true" width="{width}" height="22">'
        f"<tr>{cells}</tr></table>"
    )


_TIGHT = 'cellspacing="3" cellpadding="0"'


def _pill(kind: str, words: str = "") -> str:
    """Return a cell of fixed size: Graphviz would stretch a free one to the box's width."""
    badge = BADGES[kind]
    shown = _pill_words(kind, words)
    return (
        f'<td fixedsize="true" width="{_pill_width(shown)}" height="16" style="rounded"'
        f' bgcolor="{badge.color}">{text(shown, size=9, color=badge.ink, bold=True)}</td>'
    )


def _pill_words(kind: str, words: str) -> str:
    return shorten(f"{BADGES[kind].sign} {words}", 16)


def _pill_width(shown: str) -> int:
    return 12 + 6 * len(shown)


def legend(title: str, summary: str, kinds: Sequence[str]) -> str:
    """Return the heading of a picture: its title, what it is of, and the `kinds` it shows."""
    rows = [text(title, size=16, color=INK, bold=True), text(summary)]
    shown = [kind for kind in BADGES if kind in kinds]
    if shown:
        # Fixed for the same reason as the pills; about 5.4 points to a letter.
        width = sum(48 + 6 * len(BADGES[kind].words) for kind in shown)
        cells = "".join(
            f'{_pill(kind)}<td align="left">{text(BADGES[kind].words + "  ", size=9)}</td>'
            for kind in shown
        )
        rows.append(
            f'<table align="left" border="0" cellborder="0" {_TIGHT} fixedsize="true"'
            f' width="{width}" height="22"><tr>{cells}</tr></table>'
        )
    body = "".join(f'<tr><td align="left">{row}</td></tr>' for row in rows)
    gap = '<tr><td height="8"></td></tr>'
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="3">{body}{gap}</table>>'
