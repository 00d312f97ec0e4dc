"""The compiling process: `python -m dsc.backends.triton.compile_worker < request.json`.

The request names kernels (as in `launches.json`), one target, the folder of kernel sources and the
folder for binaries. Each kernel answers with one line of JSON on standard output: what was compiled
and what it uses, or the error. No GPU and no driver is asked for anything.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsc.backends.triton.launch import Kernel

# Bytes of shared memory that one program may use, from the vendors' architecture guides.
SHARED_LIMITS = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "gfx942": 64 * 1024, "gfx950": 160 * 1024,
}  # fmt: skip


def compile_kernel(kernel: Kernel, kind: str, arch: str, function: Any) -> Any:
    """The compiled kernel; pipeline stages are dropped until its tiles fit shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.signature)
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in kernel.aligned}
    source = ASTSource(function, dict(kernel.signature), dict(kernel.constants), attributes)
    if kind == "cuda":
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    for stages in range(kernel.stages, 0, -1):
        options = {"num_warps": kernel.warps, "num_stages": stages}
        compiled = triton.compile(source, target=target, options=options)
        if compiled.metadata.shared <= SHARED_LIMITS[arch]:
            return compiled
    needed = compiled.metadata.shared
    raise ValueError(f"needs {needed} bytes of shared memory, {arch} has {SHARED_LIMITS[arch]}")


def describe(compiled: Any, kind: str, binary: Path) -> dict[str, Any]:
    """What a launch must know of a binary, and what a reader wants to."""
    metadata = compiled.metadata
    record = {
        "file": binary.name,
        "symbol": metadata.name,
        "shared": metadata.shared,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "global_scratch": metadata.global_scratch_size,
        "profile_scratch": metadata.profile_scratch_size,
        "bytes": binary.stat().st_size,
    }
    if kind == "cuda":
        return record | {"parameters": _ptx_parameters(compiled.asm["ptx"])} | _ptxas_usage(binary)
    return record | _amdgcn_usage(compiled.asm["amdgcn"])


def _ptx_parameters(ptx: str) -> int:
    """How many parameters the entry takes: the kernel's own and Triton's hidden pointers."""
    entry = ptx[ptx.index(".entry") :]
    return len(re.findall(r"\.param", entry[: entry.index(")")]))


def _ptxas_usage(binary: Path) -> dict[str, int]:
    """Registers and bytes of stack (spills) a thread, as `cuobjdump` reads them from the binary."""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (AttributeError, OSError, RuntimeError, subprocess.CalledProcessError):
        return {}
    found = {k: re.search(rf"\b{k}:(\d+)", text) for k in ("REG", "STACK")}
    names = {"REG": "registers", "STACK": "spill_bytes"}
    return {names[k]: int(m[1]) for k, m in found.items() if m is not None}


def _amdgcn_usage(text: str) -> dict[str, int]:
    """Registers, spills and parameters from the metadata in the assembly."""
    names = {"vgpr_count": "registers", "vgpr_spill_count": "spilled_registers"}
    found = {v: re.search(rf"\.{k}:\s+(\d+)", text) for k, v in names.items()}
    usage = {k: int(m[1]) for k, m in found.items() if m is not None}
    arguments = re.findall(r"\.value_kind:\s+(\w+)", text)
    return usage | {"parameters": sum(not kind.startswith("hidden") for kind in arguments)}


def run(request: Mapping[str, Any]) -> None:
    """Compile every kernel of a request, answering as each is done."""
    from dsc.backends.triton.interpret import Kernels

    kernels = Kernels(Path(request["sources"]))
    folder = Path(request["folder"])
    kind, arch = request["kind"], request["arch"]
    suffix = "cubin" if kind == "cuda" else "hsaco"
    for key, data in request["kernels"].items():
        kernel = Kernel.from_json(data)
        try:
            function = kernels.function(kernel.module, kernel.function)
            compiled = compile_kernel(kernel, kind, arch, function)
            binary = folder / f"{key}.{suffix}"
            binary.write_bytes(compiled.asm[suffix])
            answer = {"key": key, "record": describe(compiled, kind, binary)}
        except Exception as error:
            answer = {"key": key, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Serve one request from standard input."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    run(json.load(sys.stdin))


if __name__ == "__main__":
    main()
