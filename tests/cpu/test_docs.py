"""The documents say what is there: the README's file tree is complete, and its snippet runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def listed_files() -> set[Path]:
    """Paths of the README's file tree, by indentation."""
    tree = README.split("## Files")[1].split("```")[1]
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="the snippet needs two cards: two GPUs, or none")
def test_readme_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "tokens were decoded on card 1" in done.stdout
