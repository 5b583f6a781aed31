"""Programmatic dependent launch (CUDA Programming Guide, section of that name): a kernel starts while the one before it
in its stream still runs, and waits for that one's end inside, so that launches cost nothing between small kernels.

Every kernel launched so calls `wait_for_predecessor` before it reads what an earlier kernel wrote, and before it writes
anything. Its predecessor has done the same, so that what it waits for is all that was queued before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL_CAPABILITY = 9  # the first that has it
LINE_BITS = tl.constexpr(8 * 128)  # a line of L2


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr) -> None:
    """Let the next kernel start, then wait for the end of the one before. Nothing without PDL: the launch did."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch_to_l2(ptrs: tl.tensor) -> None:
    """Ask for the lines at `ptrs`, and go on. The assembly has a result only because it must."""
    assembly: tl.constexpr = "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }"
    tl.inline_asm_elementwise(assembly, "=r,l", [ptrs.to(tl.int64)], tl.int32, False, pack=1)


def has_pdl(device: torch.device) -> bool:
    """Whether kernels on `device` may be launched ahead of the end of the one before."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= PDL_CAPABILITY
