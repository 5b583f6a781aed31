"""Nothing in the package runs a checkpoint's code or listens unasked; broken checkpoints are refused by name."""

from __future__ import annotations

import ast
import contextlib
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.bad_checkpoints import (
    CASES,
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Case,
    complaint,
    edited,
    load,
    write_checkpoint,
)

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "nanovllm").rglob("*.py"), ROOT / "green_ctx.py"]
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("socket", "socketserver", "http", "wsgiref", "xmlrpc", "asyncio", "multiprocessing", "subprocess", "pty"),
    *("fastapi", "flask", "uvicorn", "aiohttp", "zmq", "grpc", "runpy", "code"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}  # under any name: `run = exec` is found, too
FORBIDDEN_ATTRIBUTES = re.compile(
    r"torch\.load|torch\.jit\.load|torch\.hub\.\w+|os\.(system|popen|fork\w*|exec[lv]\w*|spawn\w+|posix_spawn\w*)"
    r"|builtins\.\w+|.*\.serve_forever"
)
TRUSTING = ("allow_pickle", "trust_remote_code")
ALLOWED_SERVERS = {"engine/prometheus.py"}


def unsafe(source: str, may_serve: bool = False) -> list[str]:
    """What may run a checkpoint's code, or listen."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        found += [f"line {node.lineno}: {what}" for what in _of(node, may_serve)] if hasattr(node, "lineno") else []
    return found


def _of(node: ast.AST, may_serve: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
    if isinstance(node, ast.ImportFrom):
        return _of_import(node.module or "", {alias.name for alias in node.names}, may_serve)
    if isinstance(node, ast.Call):
        return [f"{each.arg}" for each in node.keywords if each.arg in TRUSTING and not _is_false(each.value)]
    if isinstance(node, ast.Attribute):
        return [name] if FORBIDDEN_ATTRIBUTES.fullmatch(name := ast.unparse(node)) else []
    return [node.id] if isinstance(node, ast.Name) and node.id in BUILTINS else []


def _of_import(module: str, names: set[str], may_serve: bool) -> list[str]:
    bad = module.split(".")[0] in FORBIDDEN_MODULES or _is_remote(module)
    bad = bad or any(FORBIDDEN_ATTRIBUTES.fullmatch(f"{module}.{name}") for name in names)
    serves = module.split(".")[0] == "prometheus_client" and not may_serve
    return [f"from {module} import {', '.join(sorted(names))}"] if bad or serves else []


def _is_remote(module: str) -> bool:
    return module.startswith(("torch.serialization", "torch.distributed", "torch.hub"))


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_the_package_runs_no_foreign_code_and_listens_nowhere() -> None:
    assert len(SOURCES) > 50
    for path in SOURCES:
        may_serve = any(str(path).endswith(f"nanovllm/{allowed}") for allowed in ALLOWED_SERVERS)
        assert not (found := unsafe(path.read_text(), may_serve)), f"{path}: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "import http.server",
        "from socket import create_server",
        "from torch import load",
        "torch.load('x')",
        "eval('1')",
        "run = exec",
        "__import__('os')",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=wanted)",
        "np.load(path, allow_pickle=True)",
        "read = torch.load",
        "compile('1', '', 'eval')",
        "os.system('ls')",
        "from os import popen",
        "os.execv('/bin/sh', [])",
        "import subprocess",
        "import marshal",
        "builtins.exec('1')",
        "server.serve_forever()",
        "from prometheus_client import start_http_server",
        "from torch.hub import load_state_dict_from_url",
    ],
)
def test_what_is_looked_for_is_found(line: str) -> None:
    assert unsafe(f"def f():\n    {line}\n")


def test_what_is_allowed() -> None:
    assert not unsafe("model.eval()\nre.compile('x')\ntorch.compile(f)\nf(trust_remote_code=False)\nimport json\n")
    assert not unsafe("from prometheus_client import start_http_server", may_serve=True)


# -- checkpoints


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sound")
    load(folder).close()
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_bad_checkpoint_is_refused_by_name(case: Case, sound: Path, tmp_path: Path) -> None:
    assert complaint(case, sound, tmp_path / "bad") is None


def test_they_are_refused_without_asserts_too() -> None:
    assert len(CASES) >= 25
    command = [sys.executable, "-O", "-m", "tests.cpu.bad_checkpoints"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"{len(CASES)} refused\n"), done.stderr


@pytest.mark.parametrize("file", [CONFIG, TOKENIZER, WEIGHTS])
@pytest.mark.parametrize("seed", range(12))
def test_garbled_bytes_are_refused_or_harmless(file: str, seed: int, sound: Path, tmp_path: Path) -> None:
    """A few random bytes: another value may be a sound one. Nothing else than a `ValueError` may come of it."""
    rng = random.Random(f"{file} {seed}")

    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        end = len(data) if file != WEIGHTS else 2000  # the header: beyond it any byte is a weight
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(end)] = rng.randrange(256)
        (folder / file).write_bytes(data)

    found = complaint(Case("garbled", damage, "", ""), sound, tmp_path / "bad")
    assert found is None or found == "garbled: accepted", found


def test_the_cases_spoil_one_file_each(sound: Path) -> None:
    """So that what is refused is what was spoilt: the sound checkpoint has every file that a case names."""
    there = {path.name for path in sound.iterdir()}
    assert there == {CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS} and there < {case.file for case in CASES}


def test_python_files_of_a_checkpoint_are_never_imported(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "bad")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Evil", None], "AutoModelForCausalLM": "evil.Evil"}
    edited(CONFIG, auto_map=auto_map)(folder)
    edited(TOKENIZER_CONFIG, auto_map=auto_map, tokenizer_class="Evil")(folder)
    with contextlib.suppress(ValueError):
        load(folder).close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}", "{{ open('x') }}", "{%", 5],
)
def test_a_chat_template_gets_at_nothing(template: object, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "bad")
    edited(TOKENIZER_CONFIG, chat_template=template)(folder)
    with load(folder) as llm, pytest.raises(ValueError, match="chat template failed on"):
        llm.chat([{"role": "user", "content": "hi"}])
