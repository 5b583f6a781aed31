"""The documents say what is there: the README's file tree is complete, snippets run, commands are as scripts have them.

A block of commands runs, or says before it why not: `<!-- not run: … -->`. Commands in the text are not run, and a
document that has some says why; that scripts and their flags exist, and that values parse, is tested for all.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def listed_files() -> set[Path]:
    """Paths of the README's file tree, by indentation."""
    tree = README.split("## Files")[1].split("```")[1].removeprefix("text")
    parents: list[Path] = []
    found = set()
    for line in filter(str.strip, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"  +", line.strip())[0].split(", "):
            path = Path(*parents[:depth][-1:], name)
            parents[depth:] = [path]
            found.add(path)
    return found


def test_readme_tree_is_complete_and_true() -> None:
    listed = listed_files()
    missing = [path for path in listed if not (ROOT / path).exists()]
    assert not missing, f"listed, but not there: {missing}"
    sources = [p.relative_to(ROOT) for p in (ROOT / "nanovllm").rglob("*.py")]
    unlisted = [p for p in sources if p not in listed and (p.name != "__init__.py" or p.parent.name == "attention")]
    assert not unlisted, f"there, but not listed: {unlisted}"


def test_architecture_names_files_that_exist() -> None:
    names = re.findall(r"\[`([\w/]+\.py)`", ARCHITECTURE) + re.findall(r"`(tests/[\w/]+\.py)`", ARCHITECTURE)
    assert names
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "nanovllm" / name).exists(), name


# -- snippets and commands

PLACES = (ROOT, ROOT / "nanovllm", ROOT / "nanovllm/engine")
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


class Command(NamedTuple):
    """`document`: its path. `text`: as it stands there, without a comment behind."""

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text)
        return words[1:] if words[0] == "python" else words

    @property
    def is_abridged(self) -> bool:
        """It has an ellipsis: only its flags can be looked at."""
        return "…" in self.text


class Parsed(Exception):
    """In place of a script's work: its parser was content."""


def blocks(path: Path) -> list[tuple[str, str, bool]]:
    """(language, content, whether a reason stands before it) of each fenced block."""
    fences = re.findall(r"(?:^(<!--[^\n]*-->)\n+)?^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, content, bool(NOT_RUN.fullmatch(before))) for before, language, content in fences]


def shell_lines(content: str) -> list[str]:
    return [text for line in content.splitlines() if (text := line.partition("  #")[0].strip())]


def commands_of(path: Path) -> list[Command]:
    """Of its blocks, fenced or indented, and of its text."""
    text = path.read_text()
    found = [line for language, content, _ in blocks(path) if language == "bash" for line in shell_lines(content)]
    found += re.findall(r"^ {4}(python .+)$", text, re.MULTILINE)
    found += re.findall(
        r"`((?:python )?(?:[\w/]+\.py)(?: [^`]+)?|make [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    return [Command(str(path.relative_to(ROOT)), line) for line in found]


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "nanovllm/demo/README.md"]
COMMANDS = sorted({command for path in DOCUMENTS for command in commands_of(path)})
SCRIPTS = [command for command in COMMANDS if command.words[0] != "make" and len(command.words) > 1]


def script_path(command: Command) -> Path:
    """A command's script, or a module that the text names; those of the package without their folder."""
    return next((path for root in PLACES if (path := root / command.words[0]).is_file()), ROOT / "?")


def parser_of(script: Path, words: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Start a script as its command does, up to where its flags are parsed; `SystemExit` for those it does not know.

    words: None: do not even parse.
    """
    parsers: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: Any = None) -> None:
        parsers.append(parser)
        if words is not None:
            parse(parser, words)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.syspath_prepend(script.parent)
    main = runpy.run_path(str(script))["main"]
    with pytest.raises(Parsed):
        main()
    return parsers[0]


def test_every_block_says_what_it_is() -> None:
    assert to_run("python") and to_run("bash")
    for path in DOCUMENTS:
        assert 2 * len(blocks(path)) == len(re.findall("^```", path.read_text(), re.MULTILINE)), path
        for language, content, _ in blocks(path):
            assert language in ("python", "bash", "text"), f"{path}: {content}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_text_come_with_a_reason_why_they_do_not_run(path: Path) -> None:
    inline = [command for command in commands_of(path) if command in SCRIPTS]
    assert not inline or NOT_RUN.search(path.read_text()), inline


@pytest.mark.parametrize("command", SCRIPTS, ids=[f"{c.document}: {c.text[:60]}" for c in SCRIPTS])
def test_a_commands_flags_are_known(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = None if command.is_abridged else command.words[1:]
    parser = parser_of(script_path(command), words, monkeypatch)
    assert set(FLAG.findall(command.text)) <= set(parser._option_string_actions)


def test_what_is_no_flag_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parser_of(ROOT / "bench.py", ["--shape", "0.6b", "--three-gpus"], monkeypatch)


def test_scripts_and_modules_that_are_named_exist() -> None:
    named = [command for command in COMMANDS if command.words[0] != "make"]
    assert len(SCRIPTS) >= 10 and len(named) > 60
    assert not [command for command in named if not script_path(command).is_file()]


def test_flags_in_the_text_are_some_scripts() -> None:
    """Also without the command around them, as in "`--hold-s`"."""
    sources = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")))
    for path in DOCUMENTS:
        for flag in FLAG.findall(re.sub(r"<!--.*?-->", "", path.read_text())):
            assert f'"{flag}"' in sources, f"{path}: {flag}"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_targets_exist() -> None:
    targets = {word for c in COMMANDS if c.words[0] == "make" for word in c.words[1:] if "=" not in word}
    assert targets >= {"demo", "test", "test-all", "gpu", "gpu2"}
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_extras_that_are_named_exist() -> None:
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {name for path in DOCUMENTS for name in re.findall(r"nanovllm\[([\w-]+)\]", path.read_text())}
    assert named and named <= set(extras), named - set(extras)


def to_run(wanted: str) -> list[str]:
    return [content for path in DOCUMENTS for language, content, excused in blocks(path)
            if language == wanted and not excused]  # fmt: skip


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="snippets need two cards: two GPUs, or none")
@pytest.mark.parametrize("snippet", to_run("python"))
def test_snippets_run(snippet: str) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "tokens were decoded on card 1" in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="commands need two cards: two GPUs, or none")
@pytest.mark.parametrize("line", [line for content in to_run("bash") for line in shell_lines(content)])
def test_commands_run(line: str) -> None:
    command = [sys.executable, *shlex.split(line)[1:]]
    assert line.startswith("python ")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout, done.stderr
