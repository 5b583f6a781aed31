"""What is shipped works alone: a wheel, installed elsewhere, generates; the plan side needs neither torch nor more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "green_ctx.py", "nanovllm")
GENERATE = """
import sys, importlib.metadata, green_ctx, nanovllm
from nanovllm import DEMO_MODEL, LLM, SamplingParams
for path in (nanovllm.__file__, green_ctx.__file__, DEMO_MODEL):
    assert path.startswith(sys.argv[1]), path
assert importlib.metadata.version("nanovllm") == nanovllm.__version__
with LLM(DEMO_MODEL, enable_two_gpu_pd=True, device="cpu") as llm:
    (output,) = llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
assert len(output["token_ids"]) == 8 and output["text"].strip(), output
print("generated", repr(output["text"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves build/ and egg-info in its sources, and would ship what is left there."""
    sources, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), cwd=sources)
    (path,) = target.glob("nanovllm-*.whl")
    return path


def test_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "nanovllm").rglob("*.py")}
    demo = {f"nanovllm/demo/{path.name}" for path in (ROOT / "nanovllm/demo").iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {Path(name).name for name in demo}
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    packaged = {name for name in names if not name.startswith(metadata)}
    assert packaged == python | demo | {"green_ctx.py"}
    assert f"{metadata}/licenses/LICENSE" in names


def test_installed_wheel_generates(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=elsewhere)
    # Its dependencies are those of this environment; a PYTHONPATH comes before an editable install of the checkout.
    done = run_python("-c", GENERATE, str(site), cwd=elsewhere, PYTHONPATH=str(site))
    assert done.stdout.startswith("generated ")


@pytest.mark.parametrize(
    "module", ["nanovllm", "nanovllm.config", "nanovllm.engine.scheduler", "nanovllm.engine.llm_engine"]
)
def test_plan_side_imports_no_torch(module: str) -> None:
    heavy = ("torch", "transformers", "numpy", "tokenizers")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert run_python("-c", code, cwd=ROOT).stdout.strip() == "[]"


def run_python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done
