"""What the main loops of prefill's kernels cost: `python -m bench.kernel_loops [TARGET ...]`.

Flash attention at the widths of DeepSeek-V3 and a product of a chunk of 4096 tokens are compiled,
disassembled, and the instructions of their loops counted, those of the branch that masks apart.
Beside them stand the cycles of a multiprocessor that its matrix units, its issue slots and its
exponentials take for one round at the rates of `UNITS`. No GPU is asked: at best the longest of the
three passes, at worst all of matrix and issue cycles, one after the other. Docs:
docs/decisions/triton-attention.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.compile_worker import compile_kernel
from dsc.backends.triton.interpret import Kernels
from dsc.backends.triton.launch import Kernel
from dsc.backends.triton.program import lower_program
from dsc.ir.graph import GraphBuilder
from dsc.ir.parser import parse_operands
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.targets import parse_target

CALLS = {
    "mla_attention": "bf16[1,4096,128,128], bf16[1,4096,128,64], bf16[1,8192,512], bf16[1,8192,64],"
    " bf16[32768,512], i64[1] {scale=0.1352}",
    "linear": "bf16[4096,7168], bf16[7168,7168]",
}
TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942", "hip:gfx950")


@dataclass(frozen=True)
class Units:
    """Of a multiprocessor: bf16 multiply-adds a cycle, and cycles for an instruction of one warp.

    An instruction occupies one of four parts, an exponential for longer.
    """

    products: int
    issue: float
    exponential: float


UNITS = {
    "sm_80": Units(1024, 1, 8), "sm_90": Units(2048, 1, 8), "sm_100": Units(4096, 1, 8),
    "gfx942": Units(1024, 4, 16), "gfx950": Units(2048, 4, 16),
}  # fmt: skip
"""Dense peaks of the data sheets by units and clock; 16 exponentials a cycle and multiprocessor on
NVIDIA's (CUDA programming guide, arithmetic instructions), a quarter of the lanes on AMD's (CDNA3
and CDNA4 instruction sets)."""
_KINDS = (
    ("matrix", r"HMMA|HGMMA|UTC\w*MMA|v_mfma"), ("exp", r"MUFU|v_exp"),
    ("load", r"LDGSTS|UTMALDG|LDG\.|global_load"), ("shared", r"LDS|STS|LDSM|LDTM|STTM|ds_"),
    ("scalar", r"s_(?!barrier)"),
    ("float", r"F(?!ENCE)|HFMA|HADD|v_(pk_)?(mul|add|fma|max|cvt|sub)_\w*f"),
)  # fmt: skip


def kernels(target: str) -> Iterator[tuple[Kernel, Any]]:
    """The kernels of the calls, and what the compiler made of each."""
    place, graphs = parse_target(target), {}
    for op, text in CALLS.items():
        builder, (operands, attrs) = GraphBuilder(op), parse_operands(text)
        values = [builder.input(f"x{at}", type) for at, (type, _) in enumerate(operands)]
        graphs[op] = builder.finish(builder.call(op, *values, **attrs), ("y",))
    program, generated = lower_program(Program("loops", graphs, stage=Stage.LOWERED), target)
    with tempfile.TemporaryDirectory() as folder:
        for module, text in with_templates(program, generated).items():
            Path(folder, f"{module}.py").write_text(text)
        for kernel in program.kernels.values():
            function = Kernels(Path(folder)).function(kernel.module, kernel.function)
            yield kernel, compile_kernel(kernel, place.kind, place.arch, function)[0]


def code(compiled: Any) -> list[str]:
    """A kernel's instructions and labels, a line each."""
    if "amdgcn" in compiled.asm:
        lines = (line.split(";")[0].strip() for line in compiled.asm["amdgcn"].splitlines())
        return [line for line in lines if line.startswith((".LBB", "s_", "v_", "ds_", "global_"))]
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*(\.L_\w+:)|^\s*/\*[0-9a-f]+\*/\s+(.*?);", text, re.MULTILINE)
    return [label or instruction for label, instruction in found]


def main_loop(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """The shortest loop that has most of the products: what runs always, and what masks.

    Nothing where the loop was unrolled.
    """
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.endswith(":")}
    most = max(_products(lines) // 3, 1)
    jumps = [
        (labels[to[0]], at)
        for at, line in enumerate(lines)
        if re.search(r"\bBRA\b|s_c?branch", line) and (to := _label(line)) and to[0] in labels
    ]
    loops = [(a, b) for a, b in jumps if a < b and _products(lines[a:b]) >= most]
    if not loops:
        return [], []
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    skipped = next(
        (range(at + 1, to) for to, at in jumps if begin < at < to - 40 and to <= end), range(0)
    )
    body = [(at, line) for at, line in enumerate(lines[begin : end + 1], begin) if line[-1] != ":"]
    return (
        [line for at, line in body if at not in skipped],
        [line for at, line in body if at in skipped],
    )


def _label(line: str) -> list[str]:
    return re.findall(r"\.L\w+", line)


def _products(lines: Sequence[str]) -> int:
    return sum(kind_of(line) == "matrix" for line in lines)


def kind_of(line: str) -> str:
    """Which of `_KINDS` an instruction is; else it works on integers, or waits."""
    name = re.sub(r"^@!?U?P\w+\s+", "", line)
    return next((kind for kind, form in _KINDS if re.match(form, name)), "other")


def report(target: str) -> Iterator[str]:
    """A line for each kernel of a target."""
    units = UNITS[target.partition(":")[2]]
    for kernel, compiled in kernels(target):
        always, masks = main_loop(code(compiled))
        if not always:
            continue
        found = Counter(map(kind_of, always))
        c, warps = kernel.constants, kernel.warps
        flash = "BLOCK_T" in c
        sizes = (c["BLOCK_M"], c["BLOCK_T"]) if flash else (c["BLOCK_M"], c["BLOCK_N"])
        depth = c["D"] + c["R"] + c["E"] if flash else c["BLOCK_K"]
        matrix = sizes[0] * sizes[1] * depth / units.products
        issued = len(always) - (found["scalar"] if units.issue > 1 else 0)
        issue = issued * warps / 4 * units.issue
        exponential = found["exp"] * warps / 4 * units.exponential
        name = f"{kernel.function} {sizes[0]} x {sizes[1]}, {warps} warps, {kernel.stages} stages"
        counts = ", ".join(f"{kind} {n}" for kind, n in found.most_common())
        yield f"{target} {name}: {len(always)} (+{len(masks)} to mask): {counts}"
        yield f"    cycles: matrix {matrix:.0f}, issue {issue:.0f}, exp {exponential:.0f}"


def main() -> None:
    """Print the report of the targets that are named, or of all."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for target in sys.argv[1:] or TARGETS:
        print(*report(target), sep="\n", flush=True)


if __name__ == "__main__":
    main()
