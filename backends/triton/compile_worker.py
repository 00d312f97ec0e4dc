"""The compiling process: `python -m dsc.backends.triton.compile_worker < request.json`.

The request has kernels (as the `meta` of plan.json), one target, the folder of kernel sources and
the folder for binaries. Each kernel answers with one line of JSON on standard output: what was
compiled and what it uses, or the error. No GPU and no driver is asked for anything.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dsc.backends.triton.assembly import matrix_instructions
from dsc.backends.triton.devices import ARCHS
from dsc.backends.triton.launch import Kernel


def compile_kernel(kernel: Kernel, kind: str, arch: str, function: Any) -> tuple[Any, str]:
    """The compiled kernel, and what the assembler told of it.

    Pipeline stages are dropped until its tiles fit shared memory.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.nvidia.dump_ptxas_log = True
    names = list(kernel.signature)
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in kernel.aligned}
    source = ASTSource(function, dict(kernel.signature), dict(kernel.constants), attributes)
    if kind == "cuda":
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    most = ARCHS[arch].program_shared
    for stages in range(kernel.stages, 0, -1):
        options = {"num_warps": kernel.warps, "num_stages": stages}
        log = io.StringIO()
        with redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=options)
        if compiled.metadata.shared <= most:
            return compiled, log.getvalue()
    needed = compiled.metadata.shared
    raise ValueError(f"needs {needed} bytes of shared memory, {arch} has {most}")


def describe(compiled: Any, log: str, kind: str, binary: Path) -> dict[str, Any]:
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
    text = compiled.asm["ptx" if kind == "cuda" else "amdgcn"]
    record["matrix"] = matrix_instructions(text, kind)
    if kind == "cuda":
        record["dependent"] = "griddepcontrol.wait" in text
        return record | {"parameters": _ptx_parameters(text)} | _ptxas_usage(log)
    return record | _amdgcn_usage(text)


def _ptx_parameters(ptx: str) -> int:
    """How many parameters the entry takes: the kernel's own and Triton's hidden pointers."""
    entry = ptx[ptx.index(".entry") :]
    return len(re.findall(r"\.param", entry[: entry.index(")")]))


def _ptxas_usage(log: str) -> dict[str, int]:
    """Registers, bytes of stack and of spills (stored and loaded) a thread, as `ptxas -v` tells.

    And whether it has each wgmma wait for the one before, which halves the speed of a product.
    """
    found = {
        "registers": re.findall(r"Used (\d+) registers", log),
        "stack_bytes": re.findall(r"(\d+) bytes stack frame", log),
        "spill_bytes": re.findall(r"(\d+) bytes spill (?:stores|loads)", log),
    }
    usage = {name: sum(map(int, numbers)) for name, numbers in found.items() if numbers}
    return usage | {"serialised": int("wgmma.mma_async instructions are serialized" in log)}


def _amdgcn_usage(text: str) -> dict[str, int]:
    """Registers, bytes of spills and of stack, and parameters, of the assembly's metadata."""
    names = {
        "vgpr_count": "registers", "vgpr_spill_count": "spill_bytes",
        "private_segment_fixed_size": "stack_bytes",
    }  # fmt: skip
    found = {v: re.search(rf"\.{k}:\s+(\d+)", text) for k, v in names.items()}
    usage = {k: int(m[1]) for k, m in found.items() if m is not None}
    usage["spill_bytes"] = 4 * usage["spill_bytes"]
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
            compiled, log = compile_kernel(kernel, kind, arch, function)
            binary = folder / f"{key}.{suffix}"
            binary.write_bytes(compiled.asm[suffix])
            answer = {"key": key, "record": describe(compiled, log, kind, binary)}
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
