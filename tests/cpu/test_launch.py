"""Kernels that start before the one ahead of them has ended: none touches what others use before its wait."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels.paged_decode import paged_decode  # noqa: E402
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store  # noqa: E402
from nanovllm.kernels.rms_norm import add_rms_norm  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul  # noqa: E402
from tests.cpu.compile_check import assert_fits, compile_launches  # noqa: E402

MODULES = ("paged_decode", "qk_norm_rope_store", "rms_norm", "silu_mul")
# Its weight, which no kernel writes; tables, lengths and order: whose kernel has ended before the embedding begins,
# which is launched as usual.
READS_EARLY = ("_add_rms_norm_kernel", "_decode_kernel")


def launch(early: bool) -> None:
    """What lies between the products of Qwen3-8B, for 64 rows and for one, whose context is split."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    pages = new(1000, 36, 2, 64, 8, 128)
    k_pages, v_pages = pages[:, 5, 0], pages[:, 5, 1]
    add_rms_norm(new(64, 4096), new(64, 4096), new(4096), 1e-6)
    silu_mul(new(64, 2 * 12288))
    numbers, table = new(64, dtype=torch.int64), new(4096, 128, dtype=torch.float32)
    qk_norm_rope_store(new(64, 48 * 128), new(128), new(128), table, numbers, k_pages, v_pages, numbers, 1e-6)
    for rows in (64, 1):
        lengths, order = new(rows, dtype=torch.int32), new(rows, dtype=torch.int32)
        tables = new(rows, 64, dtype=torch.int32)
        q, options = new(rows, 32, 128), {"row_order": order, "num_sms": 132, "pdl": early}
        paged_decode(q, k_pages, v_pages, tables, lengths, 4096, **options)


def test_nothing_is_touched_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setattr(import_module(f"nanovllm.kernels.{name}"), "has_pdl", lambda device: True)
    reports = compile_launches(90, lambda: launch(True))
    assert len(reports) == 6, "norm, SiLU product, head norms, decode whole, decode split and its combination"
    for report in reports:
        ahead, *behind = report.ptx.split("griddepcontrol.wait")
        assert len(behind) == 1, f"{report.name} waits {len(behind)} times"
        assert "st.global" not in ahead and "bra" not in ahead, report.name
        assert report.name in READS_EARLY or "ld.global" not in ahead, report.name
        assert_fits(report)


def test_no_wait_where_the_launch_waits() -> None:
    assert all("griddepcontrol" not in report.ptx for report in compile_launches(80, lambda: launch(False)))
