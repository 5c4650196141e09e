"""What is kept of one op: flags, selections and schedules that check themselves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from fxray.draft.schedule import SCHEDULE_KEYS, Schedule
from fxray.errors import DraftError, SelectionError, nearest
from fxray.selections import NaturalSelection, Selection, check_selection

if TYPE_CHECKING:
    from fxray.architecture import Op

__all__ = [
    "KINDS",
    "Entry",
    "Keep",
    "Keeps",
    "MarkWords",
    "changed",
    "check_words",
    "keeps_of",
    "refusal",
]

KINDS = ("output", "grad", "weight", "weight_grad", "input")
"""What can be kept of an op: its output, the gradient of it, every parameter, the
gradients of those (as the optimizer used them), its input."""

_KEYS = (*KINDS, "selection", *SCHEDULE_KEYS)


_NATURAL, _ALWAYS = NaturalSelection(), Schedule()


class MarkWords(TypedDict, total=False):
    """The words of a mark, each for all its kinds or, but for the flags, by kind."""

    output: bool
    grad: bool
    weight: bool
    weight_grad: bool
    input: bool
    selection: Selection | Mapping[str, Selection]
    every: int | Mapping[str, int]
    steps: Iterable[int] | Mapping[str, Iterable[int]]
    start: int | Mapping[str, int]
    stop: int | Mapping[str, int]


@attrs.frozen
class Keep:
    """Whether, which part and when one kind of one op is kept."""

    on: bool = False
    selection: Selection = _NATURAL
    schedule: Schedule = _ALWAYS


Keeps = Mapping[str, Keep]


def refusal(op: Op, kind: str, *, fed: bool = True) -> str:
    """Return why `kind` cannot be kept of `op`, empty if it can.

    Args:
        op: the op.
        kind: one of `KINDS`.
        fed: whether another op feeds it; tells where it was traced without shapes.
    """
    if kind in {"weight", "weight_grad"}:
        return "" if op.parameters else "has no parameters"
    if op.role == "parameter":
        return 'is a bare parameter: keep its "weight" or "weight_grad"'
    if kind == "input":
        if op.role == "input":
            return 'is an input of the model: keep its "output"'
        return "" if op.inputs or (fed and not op.outputs) else "is given no tensor"
    differentiable = [spec for spec in op.outputs if _has_gradient(spec.dtype)]
    if kind == "grad" and op.outputs and not differentiable:
        return f"gives {op.outputs[0].dtype}, which has no gradient"
    return ""


def _has_gradient(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def changed(
    op: Op, keeps: Keeps, words: Mapping[str, Any], kinds: tuple[str, ...] = KINDS
) -> Keeps:
    """Return `keeps` of `op` after `words` of an entry, all checked; `kinds` take the settings.

    Raises:
        DraftError: a word is unknown, or its value no bool or schedule.
        SelectionError: a selection is none.
    """
    result = dict(keeps)
    check_words(op, words)
    for kind in KINDS:
        if kind in words:
            result[kind] = attrs.evolve(result[kind], on=_flag(op, kind, words[kind]))
    if "selection" in words:
        for kind, selection in _by_kind(op, "selection", words["selection"], kinds).items():
            _check_selection(op, kind, selection)
            result[kind] = attrs.evolve(result[kind], selection=selection)
    times: dict[str, dict[str, Any]] = {}
    for word in SCHEDULE_KEYS:
        for kind, value in _by_kind(op, word, words.get(word, {}), kinds).items():
            times.setdefault(kind, {})[word] = value
    for kind, settings in times.items():
        schedule = _scheduled(op, result[kind].schedule, settings)
        result[kind] = attrs.evolve(result[kind], schedule=schedule)
    return result


def keeps_of(op: Op, words: object) -> Keeps:
    """Return what the whole entry `words` keeps of `op`; what it leaves out is not kept."""
    if not isinstance(words, Mapping):
        msg = (
            f'{_called(op)}: {words!r} is not a dict of flags; write for example {{"output": True}}'
        )
        raise DraftError(msg)
    return changed(op, dict.fromkeys(KINDS, Keep()), words)


def _called(op: Op) -> str:
    return f"{op.key} ({op.path})"


def check_words(op: Op, words: Mapping[Any, Any]) -> None:
    """Raise DraftError if `words` holds one that no entry has; names the nearest."""
    for word in words:
        if word not in _KEYS:
            close = nearest(str(word), _KEYS, 1)
            hint = f"nearest: {close[0]!r}. " if close else ""
            msg = f"{_called(op)} has no flag {word!r}; {hint}There are {', '.join(_KEYS)}."
            raise DraftError(msg)


def _flag(op: Op, kind: str, value: object) -> bool:
    if not isinstance(value, bool):
        msg = f"{_called(op)}: {kind}={value!r} is not a flag; give True or False"
        raise DraftError(msg)
    if value and (why := refusal(op, kind)):
        msg = f"{_called(op)}: no {kind} can be kept, it {why}"
        raise DraftError(msg)
    return value


def _by_kind(op: Op, word: str, value: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the value of `word` by kind, from one value for all or `{kind: value}`."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(kinds, value)
    for kind in value:
        if kind not in KINDS:
            close = nearest(str(kind), KINDS, 1)
            hint = f"; nearest: {close[0]!r}" if close else ""
            msg = f"{_called(op)}: {word} for {kind!r}, which is none of {', '.join(KINDS)}{hint}"
            raise DraftError(msg)
    return dict(value)


def _check_selection(op: Op, kind: str, selection: object) -> None:
    try:
        check_selection(selection)
    except SelectionError as error:
        msg = f"{_called(op)}, selection of its {kind}: {error}"
        raise SelectionError(msg) from None


def _scheduled(op: Op, before: Schedule, settings: dict[str, Any]) -> Schedule:
    """Return the schedule after `settings`; steps= and the rest push each other out."""
    if settings.get("steps") is not None:
        kept: dict[str, Any] = {}
    else:
        kept = {word: getattr(before, word) for word in ("every", "start", "stop")}
    try:
        return Schedule(**(kept | settings))
    except DraftError as error:
        msg = f"{_called(op)}: {error}"
        raise DraftError(msg) from None


class Entry(MutableMapping[str, Any]):
    """What is kept of one op, as a dict that checks itself and takes effect at once.

    Keys: the flags `output`, `grad`, `weight`, `weight_grad`, `input`; `selection` and
    `every`, one value for all kinds or `{kind: value}`; and, where set, `steps`, `start`,
    `stop` likewise. One value stands for the kinds that are kept (all, when none is).
    Deleting a key puts it back: a flag to False, `selection` to the natural one.
    """

    def __init__(self, op: Op, keeps: Keeps, on_change: Callable[[], None]) -> None:
        self._op = op
        self._keeps = dict(keeps)
        self._on_change = on_change

    @property
    def keeps(self) -> Keeps:
        """Whether, which part and when, by kind."""
        return dict(self._keeps)

    def assign(self, keeps: Keeps) -> None:
        """Take over checked `keeps`."""
        self._keeps = dict(keeps)
        self._on_change()

    def __getitem__(self, key: str) -> Any:
        if key in KINDS:
            return self._keeps[key].on
        check_words(self._op, {key: None})
        values = {kind: self._value(kind, key) for kind in self._shown}
        first, *others = values.values()
        # A stranger's selection need not know ==, or answers it with a tensor.
        same = (lambda a, b: a is b) if key == "selection" else operator.eq
        return first if all(same(first, other) for other in others) else values

    @property
    def _shown(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if self._keeps[kind].on) or KINDS

    def _value(self, kind: str, key: str) -> Any:
        keep = self._keeps[kind]
        return keep.selection if key == "selection" else getattr(keep.schedule, key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.assign(changed(self._op, self._keeps, {key: value}))

    def __delitem__(self, key: str) -> None:
        rest: dict[str, Any] = {"selection": _NATURAL, "every": 1, "start": 0}
        self[key] = False if key in KINDS else rest.get(key)

    def __iter__(self) -> Iterator[str]:
        yield from (*KINDS, "selection", "every")
        plain = Schedule()
        for key in ("steps", "start", "stop"):
            if any(self._value(kind, key) != getattr(plain, key) for kind in self._shown):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
