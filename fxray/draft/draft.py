"""What will be kept, op by op: the one thing that users edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from fxray.draft.defaults import DEFAULTS, DefaultTable
from fxray.draft.entry import KINDS, Entry, Keep, Keeps, changed, check_words, keeps_of, refusal
from fxray.draft.estimate import Estimate, estimate
from fxray.draft.layout import Layout
from fxray.draft.schedule import Schedule
from fxray.draft.targets import Targets, find_targets
from fxray.errors import DraftError, nearest
from fxray.selections import Selection, describe
from fxray.tracing.names import type_of_module

if TYPE_CHECKING:
    from fxray.architecture import Architecture, Op

__all__ = ["Capture", "Draft"]


@attrs.frozen
class Capture:
    """One row of a draft, resolved and checked: one kind of one op.

    Attributes:
        op: path of the op.
        kind: one of `KINDS`.
        selection: which numbers are kept, told what the dims mean where that is known.
        schedule: at which steps.
        axes: what the dims of the tensor mean, one letter each; empty where unknown.
    """

    op: str
    kind: str
    selection: Selection
    schedule: Schedule
    axes: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready plain data, the selection as its name and settings."""
        return {
            "op": self.op,
            "kind": self.kind,
            "selection": describe(self.selection),
            "schedule": self.schedule.to_dict(),
        }


class Draft(MutableMapping[str, Entry]):
    """What will be kept of every op: a dict of dicts, checked as it is edited.

    Its keys are type keys in graph order; look-up also takes paths and fx names. Every op
    has its entry, always: deleting one keeps nothing of that op.

    Args:
        architecture: what was traced.
        model: the traced model, so that marks may name its modules and parameters.
        table: what to keep by default.
    """

    def __init__(
        self,
        architecture: Architecture,
        model: nn.Module | None = None,
        table: DefaultTable = DEFAULTS,
    ) -> None:
        self._architecture = architecture
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False)) if model else {}
        self._version = 0
        self._layout = Layout(architecture, self._torch_types())
        self._captures: tuple[int, tuple[Capture, ...]] = (-1, ())
        self._entries = {
            op.path: Entry(op, self._default(op, table), self._changed)
            for op in architecture.values()
        }

    def _default(self, op: Op, table: DefaultTable) -> Keeps:
        words = dict(self._row(op, table))
        check_words(op, words)
        for kind in KINDS:
            if words.get(kind) is True and refusal(op, kind):
                del words[kind]
        # What the table spaces is what it keeps; whatever else a user turns on is not spaced.
        return {k: keep if keep.on else Keep() for k, keep in keeps_of(op, words).items()}

    def _torch_types(self) -> dict[str, str]:
        """Return, by path, the type of torch's own class that each module derives from."""
        found = {}
        for op in self._architecture.values():
            classes = type(self._modules.get(op.module or "")).__mro__
            own = (cls for cls in classes if cls.__module__.startswith("torch.nn."))
            cls = next(own, nn.Module)
            if op.module and cls is not nn.Module:
                found[op.path] = type_of_module(cls)
        return found

    def _row(self, op: Op, table: DefaultTable) -> Mapping[str, Any]:
        if op.type in table.entries or self._model is None or op.module is None:
            return table.entries.get(op.type, {})
        classes = type(self._modules.get(op.module)).__mro__
        names = [type_of_module(cls) for cls in classes if issubclass(cls, nn.Module)]
        return next((table.entries[name] for name in names if name in table.entries), {})

    def _changed(self) -> None:
        self._version += 1

    def extend(self, architecture: Architecture) -> None:
        """Take in the ops of an architecture that has grown; of new ones nothing is kept yet."""
        if architecture is self._architecture:
            return
        self._architecture = architecture
        self._layout = Layout(architecture, self._torch_types())
        for op in architecture.values():
            if op.path not in self._entries:
                self._entries[op.path] = Entry(op, dict.fromkeys(KINDS, Keep()), self._changed)

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        return self._version

    # ---------------------------------------------------------- as a dict

    def __getitem__(self, name: str) -> Entry:
        return self._entries[self._architecture.resolve(name)]

    def __setitem__(self, name: str, words: Mapping[str, Any]) -> None:
        self.replace({name: words})

    def __delitem__(self, name: str) -> None:
        self[name].assign(dict.fromkeys(KINDS, Keep()))

    def __contains__(self, name: object) -> bool:
        return name in self._architecture

    def __iter__(self) -> Iterator[str]:
        return (op.key for op in self._architecture.values())

    def __len__(self) -> int:
        return len(self._entries)

    def replace(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Put `entries` in the place of those of the ops they name; the rest stays.

        Everything is checked before anything changes.

        Raises:
            UnknownNameError: no op is called that.
            DraftError: an entry makes no sense.
            SelectionError: a selection is none.
        """
        given: Any = entries
        if not isinstance(given, Mapping):
            msg = f'{entries!r} is no draft; write for example {{"relu-0": {{"output": True}}}}'
            raise DraftError(msg)
        checked = {}
        for name, words in entries.items():
            op = self._architecture[name]
            if op.path in checked:
                msg = f"{name!r} names {op.path!r}, which the draft names twice"
                raise DraftError(msg)
            checked[op.path] = keeps_of(op, words)
        for path, keeps in checked.items():
            self._entries[path].assign(keeps)

    # MutableMapping goes one by one; this is all or nothing.
    def update(self, entries: Any = (), /, **more: Any) -> None:
        """Do the same as `replace`."""
        self.replace({**dict(entries), **more})

    def clear(self) -> None:
        """Keep nothing of any op."""
        for entry in self._entries.values():
            entry.assign(dict.fromkeys(KINDS, Keep()))

    # ------------------------------------------------------------ marking

    def mark(  # noqa: PLR0913 - the words of an entry, each by its name
        self,
        what: Any,
        *,
        output: bool | None = None,
        grad: bool | None = None,
        weight: bool | None = None,
        weight_grad: bool | None = None,
        input: bool | None = None,  # noqa: A002 - the word of the draft
        selection: Selection | Mapping[str, Selection] | None = None,
        every: int | Mapping[str, int] | None = None,
        steps: Any = None,
        start: int | Mapping[str, int] | None = None,
        stop: int | Mapping[str, int] | None = None,
    ) -> tuple[str, ...]:
        """Keep, with True, or keep no longer, with False, kinds of what `what` means.

        `what` is a path, a type (`"relu"`), a type key, an fx name, a pattern over paths
        (`"layer1.*"`); a module or parameter of the model, or a class of modules
        (`nn.Conv2d`); a function or method (`F.relu`: the functional ones, not modules); a
        predicate of an `Op`; or a list of those. A module made of several ops means what it
        returns for `output` and `grad`, and every op beneath that has parameters for
        `weight` and `weight_grad`. A parameter means the op that owns it. A kind that only
        some of the ops can have is kept where it can.

        Args:
            what: what to mark.
            output: what the op returns.
            grad: the gradient of that.
            weight: every parameter of the op.
            weight_grad: the gradients of those, as the optimizer used them.
            input: the tensors the op is given.
            selection: which numbers, one for all kinds or by kind; natural unless given.
            every: every how many steps, likewise; every step unless given.
            steps: at exactly these steps.
            start: the first step.
            stop: the step before which it ends.

        Returns:
            Paths of the ops marked, in graph order.

        Raises:
            UnknownNameError: nothing is that; names the nearest.
            DraftError: no kind is given, or none that the op can have, or a setting is wrong.
            SelectionError: a selection is none.
        """
        given = (output, grad, weight, weight_grad, input)
        flags = {k: flag for k, flag in zip(KINDS, given, strict=True) if flag is not None}
        _check_flags(what, flags)
        settings = {"selection": selection, "every": every, "steps": steps}
        settings |= {"start": start, "stop": stop}
        words = {word: value for word, value in settings.items() if value is not None}
        _check_settings(flags, words)
        targets = find_targets(what, self._architecture, self._model)
        places = {kind: self._places(targets, kind, on=flag) for kind, flag in flags.items()}
        return self._apply(places, flags, words)

    def _apply(
        self,
        places: Mapping[str, tuple[str, ...]],
        flags: Mapping[str, bool],
        words: Mapping[str, Any],
    ) -> tuple[str, ...]:
        checked = {}
        for op in self._architecture.values():
            here = [kind for kind in KINDS if op.path in places.get(kind, ())]
            if here:
                own = {kind: flags[kind] for kind in here}
                fresh = dict(self._entries[op.path].keeps)
                fresh.update((kind, Keep()) for kind in here if flags[kind])
                on = tuple(kind for kind in here if flags[kind])
                checked[op.path] = changed(op, fresh, own | _narrowed(words, on), on)
        for path, keeps in checked.items():
            self._entries[path].assign(keeps)
        return tuple(checked)

    def _places(self, targets: Targets, kind: str, *, on: bool) -> tuple[str, ...]:
        """Return the ops of `targets` that take `kind`; an error where there are none."""
        architecture = self._architecture
        paths = targets.of(kind)
        if not on:
            return paths
        if kind == "input" and targets.composite:
            msg = (
                f"{targets.called}: no input can be kept of a module made of several ops; mark "
                "the input of the first op inside"
            )
            raise DraftError(msg)
        why = {p: refusal(architecture[p], kind, fed=self._fed(p)) for p in paths}
        taking = tuple(path for path in paths if not why[path])
        if not taking:
            msg = f"{targets.called}: no {kind} can be kept, {_reason(targets, kind, why)}"
            raise DraftError(msg)
        return taking

    def _fed(self, path: str) -> bool:
        return bool(self._architecture.graph.in_degree(path))

    def unmark(self, what: Any, *kinds: str) -> tuple[str, ...]:
        """Keep `kinds` (all unless given) of what `what` means no longer, as in `mark`."""
        for kind in kinds:
            if kind not in KINDS:
                close = nearest(str(kind), KINDS, 1)
                hint = f"nearest: {close[0]!r}. " if close else ""
                msg = f"no kind {kind!r}; {hint}There are {', '.join(KINDS)}."
                raise DraftError(msg)
        targets = find_targets(what, self._architecture, self._model)
        flags = dict.fromkeys(kinds or KINDS, False)
        return self._apply({kind: targets.of(kind) for kind in flags}, flags, {})

    # ------------------------------------------------------------ results

    def captures(self) -> tuple[Capture, ...]:
        """Return every row of the draft: in graph order, kinds in the order of `KINDS`."""
        if self._captures[0] != self._version:
            rows = tuple(
                self._capture(op, kind, keep)
                for op in self._architecture.values()
                for kind, keep in self._entries[op.path].keeps.items()
                if keep.on
            )
            self._captures = (self._version, rows)
        return self._captures[1]

    def _capture(self, op: Op, kind: str, keep: Keep) -> Capture:
        axes = self._layout.axes(op, kind)
        bind = getattr(keep.selection, "bind", None)
        selection = bind(axes) if axes is not None and callable(bind) else keep.selection
        return Capture(op.path, kind, selection, keep.schedule, axes or "")

    def estimate(self, steps: int) -> Estimate:
        """Return what recording `steps` training steps will cost, roughly; see `Estimate`."""
        return estimate(self._architecture, self.captures(), steps)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the captures as JSON-ready rows."""
        return [capture.to_dict() for capture in self.captures()]

    def __str__(self) -> str:
        rows = [("key", "op", "kind", "selection", "when")]
        for row in self.captures():
            key = self._architecture[row.op].key
            rows.append((key, row.op, row.kind, repr(row.selection), str(row.schedule)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join(line.rstrip() for line in [repr(self), *(lines if rows[1:] else ())])

    def __repr__(self) -> str:
        kept = {row.op for row in self.captures()}
        count = f"{len(self.captures())} captures of {len(kept)} of {len(self)} ops"
        return f"<Draft for {self._architecture.model}: {count}>"


def _check_flags(what: Any, flags: Mapping[str, object]) -> None:
    if not flags:
        msg = f"mark({what!r}): say what to keep of it, e.g. output=True ({', '.join(KINDS)})"
        raise DraftError(msg)
    for kind, flag in flags.items():
        if not isinstance(flag, bool):
            msg = f"mark({what!r}): {kind}={flag!r} is not a flag; give True or False"
            raise DraftError(msg)


def _check_settings(flags: Mapping[str, bool], words: Mapping[str, Any]) -> None:
    on = [kind for kind, flag in flags.items() if flag]
    for word, value in words.items():
        strange = [k for k in value if k not in on] if isinstance(value, Mapping) else []
        if strange or not on:
            kind = repr(strange[0]) if strange else "nothing"
            msg = f"{word}= is for {kind}, which this mark does not keep; add its flag, =True"
            raise DraftError(msg)


def _narrowed(words: Mapping[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return `words`, those by kind narrowed to the kinds that this op takes."""
    return {
        word: {k: v for k, v in value.items() if k in kinds}
        if isinstance(value, Mapping)
        else value
        for word, value in words.items()
        if kinds
    }


def _reason(targets: Targets, kind: str, why: Mapping[str, str]) -> str:
    if why:
        path, reason = next(iter(why.items()))
        return f"it {reason}" if len(why) == 1 else f"none of {len(why)} ops can ({path} {reason})"
    if targets.composite:
        return "nothing beneath has any" if kind.startswith("weight") else _NEVER_RETURNS
    return 'a parameter has a "weight" and a "weight_grad"'


_NEVER_RETURNS = "the module is never called itself, or returns no tensor; mark the ops inside it"
