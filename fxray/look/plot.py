"""The drawing that suits what was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from fxray.errors import PictureError
from fxray.look.curves import Loss, histograms, ranks, statistics
from fxray.look.images import (
    attention,
    feature_maps,
    filters,
    flattened,
    matrices,
    sequences,
    vectors,
)
from fxray.look.plotdata import PlotData, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RULES", "PlotData", "Rule", "plot", "rule_for"]


Drawing = Callable[[PlotData], "Figure"]
"""A function that draws every row it is given."""


@attrs.frozen
class Rule:
    """What is drawn, when.

    Attributes:
        name: what the drawing is called.
        suits: whether the drawing suits the data.
        draw: the drawing, of every row it is given.
        evolves: whether the drawing has steps along an axis; if not, the last row is
            drawn unless steps are asked for.
        rows: the most rows it draws, evenly chosen of those it is given; None: all.
    """

    name: str
    suits: Callable[[PlotData], bool]
    draw: Drawing
    evolves: bool = False
    rows: int | None = None


def _fields(*names: str) -> Callable[[PlotData], bool]:
    return lambda data: set(names) <= data.fields


def _is_matrix(data: PlotData) -> bool:
    return data.kind in ("weight", "weight_grad") or "N" not in data.letters


def _has(letters: str) -> Callable[[PlotData], bool]:
    return lambda data: set(data.letters) == set(letters) and len(data.letters) == len(letters)


def _either(*letters: str) -> Callable[[PlotData], bool]:
    return lambda data: any(_has(one)(data) for one in letters)


def _attention(data: PlotData) -> bool:
    """Return whether each row of the last two dims is a share of one: weights of attention."""
    last = data.only[-1] if data.ndim in (3, 4) and data.kind in ("output", "input") else None
    if last is None or data.letters not in ("NCHW", "NTC", "NCL"):
        return False
    if last.shape[-1] != last.shape[-2] or last.shape[-1] < 2 or not last.size:
        return False
    shares = numbers(last)
    # Not closer: each share may be rounded to the eight bits of bfloat16.
    return bool((shares >= 0).all() and np.allclose(shares.sum(axis=-1), 1, atol=0.02))


# The first that suits draws. A new drawing is a function of PlotData and a line here.
RULES: tuple[Rule, ...] = (
    Rule("histograms", _fields("counts", "edges"), histograms, evolves=True, rows=16),
    Rule("ranks", _fields("values", "indices"), ranks, evolves=True, rows=256),
    Rule("statistics", lambda d: d.is_scalar, statistics, evolves=True),
    Rule("filters", _either("OIHW", "OIL", "OIDHW"), filters, rows=12),
    Rule("attention", _attention, attention, rows=12),
    Rule("feature maps", _either("NCHW", "NCDHW"), feature_maps, rows=12),
    Rule("sequences", _either("NTC", "NCL"), sequences, rows=4),
    Rule("matrix", lambda d: d.ndim == 2 and _is_matrix(d), matrices, rows=4),
    Rule("vectors", lambda d: d.ndim in (1, 2), vectors, evolves=True, rows=256),
    Rule("elements", lambda _: True, flattened, evolves=True, rows=256),
)


def rule_for(data: PlotData) -> Rule:
    """Return the first rule that suits `data`; the last suits everything."""
    return next(rule for rule in RULES if rule.suits(data))


def plot(  # noqa: PLR0913  # the choices of one picture
    data: PlotData,
    *,
    step: int | None = None,
    steps: Sequence[int] | None = None,
    field: str | None = None,
    loss: Loss | None = None,
    loss_name: str = "loss",
) -> Figure:
    """Return a figure of `data` that suits its kind, its axes and its selection.

    Convolution weights become a grid of filters, outputs of convolutions a grid of maps
    (attention: of samples by heads),
    linear weights a matrix, tokens by channels a heat map; vectors a heat map over steps,
    scalars and statistics lines, histograms a ridge, the largest elements their ranks;
    anything else a heat map of its elements over steps. NaN and infinities are drawn in
    a colour of their own and do not move the limits.

    Args:
        data: what was kept.
        step: draw this step alone; without `step` and `steps`, images are of the last.
        steps: draw these steps: side by side or beneath each other where one is an image.
        field: draw this field of the selection alone.
        loss: steps and the loss at each, drawn beneath lines over steps.
        loss_name: what the loss is called there.

    Returns:
        A `matplotlib.figure.Figure` that shows itself in a notebook; pyplot is not used.

    Raises:
        MissingExtraError: matplotlib is not installed.
        NotSavedError: a step or field that was not kept; the message names the nearest.
        PictureError: both `step` and `steps` are given.
    """
    if step is not None and steps is not None:
        msg = "both step= and steps= are given; steps=[…] takes one step too."
        raise PictureError(msg)
    chosen = data if field is None else data.with_field(field)
    rule = rule_for(chosen)
    if step is not None:
        chosen = chosen.at_steps([step])
    elif steps is not None:
        chosen = chosen.at_steps(steps)
    elif not rule.evolves:
        chosen = chosen.at_rows([len(chosen.steps) - 1])
    if rule.rows is not None:
        chosen = chosen.thinned(rule.rows)
    if loss is not None and rule.draw is statistics:
        return statistics(chosen, loss, loss_name)
    return rule.draw(chosen)
