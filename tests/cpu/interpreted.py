"""Checks that run under Triton's interpreter, in a process of their own.

TRITON_INTERPRET must be set before triton is imported, so a test file that has such checks runs itself as a program:
`run_checks` there prints one JSON object, check → its traceback or null, and `results_of` here reads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run the checks named on the command line, or all."""
    results: dict[str, str | None] = {}
    for seed, (name, check) in enumerate(checks.items()):
        if len(sys.argv) > 1 and name not in sys.argv:
            continue
        torch.manual_seed(seed)
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def results_of(module: str, timeout_s: float = 500) -> dict[str, str | None]:
    environment, command = os.environ | {"TRITON_INTERPRET": "1"}, [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    results: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return results
