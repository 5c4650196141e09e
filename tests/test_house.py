"""The plan of the house: who imports whom, what is public, what may lie where."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fxray"

PLAN = (
    ("cli",),
    ("demo",),
    ("xray", "integrations", "view"),
    ("capture", "run"),
    ("look",),
    ("store",),
    ("draft",),
    ("tracing",),
    ("selections",),
    ("architecture",),
    ("errors", "torch_private", "version"),
)
"""The wings, in the order the data takes them in reverse: a wing imports from the lines
below its own, never from its own line. A new module gets its place here first."""

LEVEL = {wing: level for level, line in enumerate(PLAN) for wing in line}

FREE = {"__init__", "__main__", "testing"}
"""The front door imports what is public; `testing` serves those who extend fxray, and
nobody inside."""

MAY_IMPORT_ROOT = {"cli", "demo", "__main__"}
"""Users of the public names; anybody else would close a circle through the front door."""

PUBLIC = (
    # the way through
    *("trace", "Xray", "record", "Recorder", "open", "runs", "Run", "Series"),
    # what is traced
    *("Architecture", "Op", "TensorSpec"),
    # what is kept
    *("Draft", "DEFAULTS", "DefaultTable", "Schedule", "Capture", "Estimate"),
    # which numbers of it
    *("Selection", "NaturalSelection", "Whole", "Slice", "TopK", "Sample"),
    *("Mean", "Norm", "Stats", "Histogram"),
    # what may go wrong
    *("FxrayError", "FxrayWarning", "TraceError", "SpecialisationError", "UnknownNameError"),
    *("DraftError", "SelectionError", "RecordError", "StoreError", "NotARunError"),
    *("NotSavedError", "PictureError", "MissingExtraError"),
)

TOP = {
    ".ci",
    ".github",
    ".gitignore",
    "LICENSE",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "corpus",
    "docs",
    "fxray",
    "pyproject.toml",
    "tests",
}

LINES = 450


@cache
def modules() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def door(path: Path) -> str:
    """Return the dotted name of the module at `path`, a package without its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def doors() -> frozenset[str]:
    return frozenset(door(path) for path in modules())


def wing(module: str) -> str:
    """Return the wing of a dotted name: `fxray.store.zarr` stands in `store`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


class Import(NamedTuple):
    line: int
    module: str
    """Dotted name inside fxray, or `fxray` itself for a name taken from the front door."""


def imports_in(module: ast.Module) -> Iterator[Import]:
    """Yield what `module` imports of fxray: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "fxray":
                    yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            source = node.module or ""
            if source.partition(".")[0] == "fxray":
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield Import(node.lineno, inner if inner in doors() else source)


@cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(imports_in(tree(path)))


def points_down(importer: str, imported: str) -> bool:
    """Return whether the plan lets the wing `importer` import from the wing `imported`."""
    return importer == imported or LEVEL.get(imported, -1) > LEVEL[importer]


def tracked() -> list[Path]:
    """Return every file that git knows or would take, of the work tree as it is."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = done.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def each_module() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))


# Arrows


@each_module()
def test_every_import_points_down(path: Path) -> None:
    own = wing(door(path))
    if own in FREE:
        return
    assert own in LEVEL, f"fxray/{own} has no place in PLAN yet: give it one"
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {own} may not import {module}"
        for line, module in imports(path)
        if module != "fxray" and not points_down(own, wing(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_plan_is_what_the_house_says() -> None:
    assert points_down("cli", "demo")
    assert points_down("xray", "capture")
    assert points_down("capture", "store")
    assert points_down("tracing", "torch_private")
    assert not points_down("capture", "run")
    assert not points_down("run", "capture")
    assert not points_down("look", "run")
    assert not points_down("architecture", "selections")
    assert not points_down("errors", "architecture")
    assert not points_down("store", "testing")


def test_every_manner_of_import_is_seen() -> None:
    source = """
from typing import TYPE_CHECKING
import numpy, fxray.errors as e
from fxray import errors, trace
if TYPE_CHECKING:
    from fxray.architecture import Op
def f():
    from fxray.errors import TraceError
"""
    found = sorted((i.line, i.module) for i in imports_in(ast.parse(source)))
    assert found == [
        (3, "fxray.errors"),
        (4, "fxray"),
        (4, "fxray.errors"),
        (6, "fxray.architecture"),
        (8, "fxray.errors"),
    ]


@each_module()
def test_nobody_inside_comes_in_by_the_front_door(path: Path) -> None:
    own = wing(door(path))
    lines = [line for line, module in imports(path) if module == "fxray"]
    assert not lines or own in MAY_IMPORT_ROOT, (
        f"{path.relative_to(ROOT)}:{lines[0]}: import from the module that has the name"
    )


def test_no_circle_of_modules() -> None:
    arrows = {
        door(path): {m for _, m in imports(path) if m != "fxray"}
        for path in modules()
        if door(path) != "fxray"
    }
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                walk(other, (*trail, module))
            done.add(module)

    for module in sorted(arrows):
        walk(module, ())


# Doors


@each_module()
def test_a_module_is_a_sentence(path: Path) -> None:
    text = ast.get_docstring(tree(path))
    assert text, f"{path.relative_to(ROOT)} has no docstring"
    first = text.splitlines()[0]
    assert re.fullmatch(r"[^a-z\s].*[.]", first), f"not one sentence on one line: {first!r}"


@each_module()
def test_a_room_is_a_few_hundred_lines(path: Path) -> None:
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= LINES, f"{path.relative_to(ROOT)} has {count} lines: it is two modules"


EMPTY_WORDS = re.compile(r"(^|_)(utils?|helpers?|managers?|probes?|taps?)($|_)")
DRAWERS = re.compile(r"(^|_)(misc|common|core|base)($|_)")


@each_module()
def test_no_name_says_nothing(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    defined = [
        node.name
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    empty = [part for part in parts if DRAWERS.search(part)]
    for name in (*parts, *defined):
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
        empty += [name] if EMPTY_WORDS.search(snake) else []
    assert not empty, f"{path.relative_to(ROOT)}: {empty} say nothing; name what it does"


# Private torch


def private_torch_names(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and name of every private name that `module` takes from torch."""
    bound: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torch":
                    bound[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    yield from _if_private(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if source.partition(".")[0] == "torch":
                for alias in node.names:
                    bound[alias.asname or alias.name] = f"{source}.{alias.name}"
                    yield from _if_private(node.lineno, f"{source}.{alias.name}")
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield from _if_private(node.lineno, _dotted(node, bound))


def _dotted(node: ast.expr, bound: dict[str, str]) -> str:
    """Return `torch.nn.Module._call_impl` for `nn.Module._call_impl`; else the empty text."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, bound)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _if_private(line: int, name: str) -> Iterator[tuple[int, str]]:
    if any(re.match(r"_(?!_)", part) for part in name.split(".")):
        yield line, name


def test_private_names_of_torch_are_found() -> None:
    source = """
import torch, torch._dynamo as d
from torch import nn, _C
import torch.nn.functional as F
def f(x):
    torch._C._current_graph_task_id(); nn.Module._call_impl; F._verify; nn.Module.__call__
    x._base; F.relu(x)
"""
    names = sorted({name for _, name in private_torch_names(ast.parse(source))})
    assert names == [
        "torch._C",
        "torch._C._current_graph_task_id",
        "torch._dynamo",
        "torch.nn.Module._call_impl",
        "torch.nn.functional._verify",
    ]


@each_module()
def test_private_names_of_torch_stand_in_one_file(path: Path) -> None:
    if path == PACKAGE / "torch_private.py":
        return
    found = [f"{path.relative_to(ROOT)}:{n}: {name}" for n, name in private_torch_names(tree(path))]
    assert not found, "\n".join([*found, "put it in fxray/torch_private.py, with its self-test"])


# The front door


def test_the_public_names_are_these() -> None:
    import fxray

    assert sorted(fxray.__all__) == sorted(PUBLIC), "a public name is a promise: say so in PUBLIC"
    assert len(set(fxray.__all__)) == len(fxray.__all__)


def test_nothing_looks_public_that_is_not() -> None:
    import fxray

    looks = {
        name
        for name, value in vars(fxray).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert looks <= set(fxray.__all__), "in __all__ or with an underscore, nothing between"


def test_every_public_name_is_documented() -> None:
    import fxray

    bare = []
    for name in fxray.__all__:
        value = getattr(fxray, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        # attrs and dataclasses write "Name(field, …)" for a class without a docstring.
        if not text or text.startswith(f"{name}("):
            bare.append(name)
        if inspect.isclass(value):
            bare += [
                f"{name}.{attribute}"
                for attribute, member in vars(value).items()
                if not attribute.startswith("_")
                and (inspect.isroutine(member) or isinstance(member, property))
                and not inspect.getdoc(getattr(value, attribute))
            ]
    assert not bare, f"without a docstring: {', '.join(bare)}"


# The repository


def test_the_top_holds_only_what_it_may() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert top <= TOP, f"not at the top: {sorted(top - TOP)}"


def test_no_path_of_anyones_machine() -> None:
    # `work` and its like are folders at the root of a machine; in a URL or inside a path
    # something stands before the slash.
    local = re.compile(r"(?<![\w.})>*:])/(?:work|root|home|Users|opt|mnt|media|scratch)/[\w.-]+")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{path.relative_to(ROOT)}:{number}: {match.group()}"
            for number, line in enumerate(text.splitlines(), 1)
            for match in local.finditer(line)
        ]
    assert not found, "\n".join(found)


def test_change_fragments_are_named_well() -> None:
    folder = ROOT / "docs" / "changes"
    named = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\.(added|changed|fixed|removed)\.md")
    wrong = [
        p.name for p in folder.iterdir() if p.name != "README.md" and not named.fullmatch(p.name)
    ]
    assert not wrong, f"{wrong}: see docs/changes/README.md"
    assert all(path.read_text(encoding="utf-8").strip() for path in folder.iterdir())


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(line for extra in extras for line in extra)]
    normal = {re.split(r"[\[>=<~! ]", line)[0].lower().replace("_", "-") for line in asked}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "exact versions only"
    pinned = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    assert normal - {"fxray"} <= pinned
