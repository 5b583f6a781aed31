"""One line says what an engine found and chose; everything else the library says goes through `logging` too."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nanovllm.config import Config
from nanovllm.engine.start_line import start_line
from tests.cpu.tiny import make_llm, write_config

PACKAGE = Path(__file__).parents[2] / "nanovllm"
CHOSEN = "attention: torch; graphs: none; decode pipeline: "
CARDS = [f"card {card}: cpu, float32, {blocks} blocks of 16 tokens; " for card, blocks in enumerate((64, 40))]
LINKS = "link 0 → 1: host memory; link 1 → 0: host memory; "
NO_PARTITIONS = "sequential (no SM partitions on cpu: that needs a CUDA device)"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, CARDS[0] + CHOSEN + "disabled"),
        (
            {"enable_two_gpu_pd": True, "num_kvcache_blocks": (64, 40)},
            "".join(CARDS) + LINKS + "roles: elastic; " + CHOSEN + "disabled",
        ),
        (
            {
                "enable_two_gpu_pd": True,
                "num_kvcache_blocks": (64, 40),
                "pd_roles": "strict",
                "enable_decode_pipeline": True,
            },
            "".join(CARDS) + LINKS + "roles: strict; " + CHOSEN + NO_PARTITIONS,
        ),
    ],
)
def test_one_line_at_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], expected: str
) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        make_llm(write_config(tmp_path), **options).close()
    lines = [record for record in caplog.records if "blocks of" in record.getMessage()]
    assert [(line.name, line.getMessage()) for line in lines] == [("nanovllm", expected)]


def fake_card(index: int, way: str, mode: dict[str, Any]) -> Any:
    cache = SimpleNamespace(num_blocks=9000 + index, block_size=64, copy_way=lambda other: way)
    model = SimpleNamespace(dtype=torch.bfloat16, attention=SimpleNamespace(name="triton"))
    device = torch.device("cuda", index)
    return SimpleNamespace(
        device=device, kv_cache=cache, model=model, graphs=object(), get_pipeline_statistics=lambda: mode
    )


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("engines", "peer access, copy engines"),
        ("push", "peer access, a kernel"),
        ("staged", "no peer access, staged"),
    ],
)
def test_the_line_on_two_gpus(way: str, said: str) -> None:
    cards = [fake_card(index, way, {"mode_running": "auto", "fallback_cause": None}) for index in range(2)]
    with patch.object(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}"):
        line = start_line(Config("m", enable_two_gpu_pd=True), cards, {(0, 1): 333.4, (1, 0): 332.6})
    assert line == (
        "card 0: cuda:0 (GPU 0), bfloat16, 9000 blocks of 64 tokens; "
        "card 1: cuda:1 (GPU 1), bfloat16, 9001 blocks of 64 tokens; "
        f"link 0 → 1: {said}, 333 GB/s; link 1 → 0: {said}, 333 GB/s; roles: elastic; attention: triton; "
        "graphs: captured; decode pipeline: auto"
    )


def calls(tree: ast.AST) -> list[tuple[ast.Call, str, str]]:
    """Every call, what it calls, and the function that it is in."""
    found = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.Call):
            found.append((node, ast.unparse(node.func), function))
        for child in ast.iter_child_nodes(node):
            walk(child, child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function)

    walk(tree, "")
    return found


def unlogged(source: str) -> list[str]:
    """What writes elsewhere than to a logger of ours. Printing is what `print_…` is for."""
    found = []
    for call, name, function in calls(ast.parse(source)):
        written = name in ("print", "pprint", "pprint.pprint") or name.startswith(("sys.stdout.", "sys.stderr."))
        root = name.startswith("logging.") and name != "logging.getLogger"
        logger = ast.unparse(call.args[0]) if name == "logging.getLogger" and call.args else "'nanovllm'"
        if (written and not function.startswith("print_")) or root or not logger.startswith(("'nanovllm", "__name__")):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_the_library_prints_nothing() -> None:
    found = {str(path): unlogged(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert found and not {path: lines for path, lines in found.items() if lines}


def test_what_is_looked_for_is_found() -> None:
    bad = (
        "print(1)",
        "sys.stderr.write('x')",
        "logging.info('x')",
        "logging.getLogger('other')",
        "logging.basicConfig()",
    )
    assert all(unlogged(f"def f():\n    {line}") for line in bad)
    assert not unlogged("def print_statistics():\n    print(1)\nlogging.getLogger('nanovllm.engine')")
