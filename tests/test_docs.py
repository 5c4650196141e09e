"""Every example of the README and of the pages runs, or says why it does not."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)$")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        line: where its first line of text stands in the page, from 1.
        language: first word of the info string, lower case; empty without one.
        skip: why it is not run; empty for one that is.
        text: what it holds.
    """

    line: int
    language: str
    skip: str
    text: str


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found: list[Block] = []
    opened: re.Match[str] | None = None
    start = 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = FENCE.match(line)
        if opened is None and match:
            opened, start = match, number + 1
        elif opened is not None and line.strip() == opened["ticks"]:
            info, indent = opened["info"].strip(), len(opened["indent"])
            reason = re.search(r'\bskip="([^"]+)"', info)
            body = "\n".join(inner[indent:] for inner in lines[start:number]) + "\n"
            language = info.split()[0].lower() if info else ""
            found.append(Block(start + 1, language, reason[1] if reason else "", body))
            opened = None
    assert opened is None, f"the block that opens at line {start} is never closed"
    return found


def page(path: Path) -> str:
    return path.read_text(encoding="utf-8")


each_page = pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@each_page
def test_python_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the blocks of a page in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page(path)):
        if block.skip:
            continue
        if block.language in {"python", "py"}:
            # The blank lines make the line numbers of a traceback those of the page.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(path), "exec"), names)
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(
                block.text, names, path.name, str(path), block.line - 1
            )
            flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
            runner = doctest.DocTestRunner(optionflags=flags)
            said: list[str] = []
            runner.run(test, out=said.append, clear_globs=False)
            assert not runner.failures, "".join(said)
            names.update(test.globs)


@each_page
def test_python_blocks_say_their_language(path: Path) -> None:
    bare = [b.line for b in blocks(page(path)) if not b.language]
    assert not bare, (
        f"{path.name}: what do the blocks at lines {bare} hold? (text, if nothing else)"
    )


def fxray_commands(text: str) -> list[list[str]]:
    """Return the arguments of every `fxray …` in the shell blocks of a page.

    >>> fxray_commands("```bash\\npython3 -m venv v && v/bin/fxray demo --epochs 2  # go\\n```")
    [['demo', '--epochs', '2']]
    """
    found = []
    for block in blocks(text):
        if block.language not in {"bash", "sh", "console", "shell"} or block.skip:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "console" and not line.startswith("$"):
                continue  # what the command prints
            words = shlex.shlex(line.removeprefix("$"), posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command: list[str] = []
            for word in [*words, ";"]:
                if set(word) <= set("();<>|&"):
                    if command and Path(command[0]).name == "fxray":
                        found.append(command[1:])
                    command = []
                else:
                    command.append(word)
    return found


@each_page
def test_commands_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ask each command that a page names for its help, its own options left in place."""
    commands = fxray_commands(page(path))
    if not commands:
        return
    from fxray.cli import main

    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        said = capsys.readouterr()
        assert stop.value.code in {0, None}, f"fxray {shlex.join(command)}\n{said.err}"


@each_page
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"(?ms)^ *(`{3,}).*?^ *\1$", "", page(path))
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)[^)]*\)", text)
    dead = [link for link in links if not (path.parent / link).exists()]
    assert not dead, f"{path.relative_to(ROOT)}: {dead}"


def test_the_readme_has_its_two_commands() -> None:
    """The README's blocks marked for the demo and for the tests do all their set-up."""
    text = page(ROOT / "README.md")
    for name, last in (("demo", ".venv/bin/fxray demo"), ("test", ".venv/bin/python -m pytest")):
        (block,) = re.findall(rf"^```bash {name}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        first, *_, end = [part.strip() for part in block.split("&&")]
        assert first == "python3 -m venv .venv"
        assert end == last
        assert "-c constraints.txt" in block


def test_no_page_shares_its_name() -> None:
    """On a disk that ignores case two pages must not become one."""
    names = [str(p.relative_to(ROOT)).lower() for p in PAGES]
    assert len(set(names)) == len(names)
