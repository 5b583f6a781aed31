"""Compile Triton kernels for a GPU that this machine need not have, and read what they take of it.

`compile_launches` compiles exactly what a wrapper launches (types, alignments, constants, warps, stages):

    for report in compile_launches(90, lambda: my_wrapper(torch.empty(8, 128, device="meta"))):
        assert_fits(report)

Tensors on "meta" cost nothing, whatever their shape; they count as aligned to 16 bytes, as torch allocates
them. `compile_kernel` takes a signature instead. Both need a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10}  # what one block may have, by compute capability


@dataclass(frozen=True)
class CompileReport:
    """One compiled kernel. `shared_bytes` per block, `registers` and `spill_bytes` (stores + loads) per thread."""

    name: str
    capability: int
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    ptx: str
    hash: str  # equal for two launches that run the same binary


def assert_fits(report: CompileReport, max_registers: int = 255, max_spill_bytes: int = 0) -> None:
    """Fail if the kernel cannot run on its target, spills, or takes more registers a thread than allowed."""
    shared_limit = SHARED_LIMIT_BYTES[report.capability]
    summary = f"{report.name} for sm_{report.capability}"
    assert report.shared_bytes <= shared_limit, f"{summary}: {report.shared_bytes} > {shared_limit} bytes shared"
    assert report.spill_bytes <= max_spill_bytes, f"{summary}: spills {report.spill_bytes} > {max_spill_bytes} bytes"
    assert report.registers <= max_registers, f"{summary}: {report.registers} > {max_registers} registers"


def compile_launches(capability: int, call: Callable[[], object]) -> list[CompileReport]:
    """Run `call`, compiling each kernel it launches for sm_`capability` instead of running it; in launch order."""
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled.append(launch(self, *args, **(kwargs | {"warmup": True})))

    before = driver._active
    driver.set_active(_PretendDriver(capability))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            call()
    finally:
        driver.set_active(before)
    return [_report(kernel, capability) for kernel in compiled]


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible_by_16: Iterable[str] | None = None,
) -> CompileReport:
    """Compile a `@triton.jit` function for sm_`capability`.

    signature: run-time parameter → type, as "*bf16", "i64", "fp32". constexprs: all the others.
    divisible_by_16: parameters the compiler may take as aligned; by default every pointer.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    if divisible_by_16 is None:
        divisible_by_16 = [name for name, kind in signature.items() if kind.startswith("*")]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(kernel, types, constexprs, attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return _report(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), capability)


class _PretendDriver:
    """What `JITFunction.run` asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"  # the key of a kernel's cache: never that of a real device

    def get_current_stream(self, device: str) -> int:
        return 0


def _report(kernel: Any, capability: int) -> CompileReport:
    ptx = kernel.asm["ptx"]
    registers, spill_bytes = _assemble(ptx)
    return CompileReport(
        name=kernel.metadata.name,
        capability=capability,
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
        ptx=ptx,
        hash=kernel.hash,
    )


def _assemble(ptx: str) -> tuple[int, int]:
    """(registers, spill bytes) a thread, as Triton's own ptxas reports them."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None, "PTX names its target"
    with TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{source}.o"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert spills, f"no spill counts in the report of ptxas: {log}"
    return int(registers), sum(map(int, spills))
