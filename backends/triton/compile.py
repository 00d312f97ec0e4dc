"""Ahead-of-time compilation of kernels, in processes of their own.

The flag that makes Triton interpret acts at import, and importing triton takes a second: so the
compiler of dsc never imports it, and hands kernels to `compile_worker.py` instead.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsc import kept
from dsc.backends.triton.devices import ARCHS
from dsc.backends.triton.launch import Kernel
from dsc.errors import BackendUnavailable
from dsc.processes import child_environment
from dsc.runtime.emission import Progress
from dsc.targets import Target

KERNELS_A_WORKER = 12
SETTINGS = ("TRITON_", "AMDGCN_", "NVPTX_", "PTXAS_", "LLVM_", "MLIR_", "DISABLE_")
"""How variables begin by which Triton, and the compilers under it, are told what code to make."""


def kernel_environment() -> dict[str, str]:
    """The environment of processes that compile kernels or interpret them."""
    return {"TRITON_DEFAULT_FP_FUSION": "1", **child_environment()}


def has_triton() -> bool:
    """Whether triton is installed; imports nothing."""
    return importlib.util.find_spec("triton") is not None


def compiler_environment(cache: Path) -> dict[str, str]:
    """That of processes that compile, whose Triton keeps in `cache` what it keeps.

    We keep it too, with the assembler's log; from a folder that others have it might go meanwhile.
    """
    environment = {**kernel_environment(), "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    return environment


def require_triton() -> None:
    """Raise `BackendUnavailable` where triton is not installed."""
    if not has_triton():
        hint = "pip install 'triton>=3.5' (Linux wheels; no GPU is needed to compile)"
        raise BackendUnavailable("the triton backend needs the triton package", hint)


def compile_kernels(
    kernels: Mapping[str, Kernel],
    target: Target,
    sources: Mapping[str, str],
    progress: Progress | None = None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Binaries by file name, and the record of each kernel by key, for one target.

    What was compiled before is kept (`dsc.kept`). Raises `RuntimeError` with every kernel that did
    not compile.
    """
    binaries, records, failed = compile_each(kernels, target, sources, progress)
    if failed:
        detail = "\n".join(f"{name}: {why}" for name, why in failed.items())
        raise RuntimeError(f"{len(failed)} kernels did not compile for {target}:\n{detail}")
    return binaries, records


def compile_each(
    kernels: Mapping[str, Kernel],
    target: Target,
    sources: Mapping[str, str],
    progress: Progress | None = None,
) -> tuple[dict[str, bytes], dict[str, Any], dict[str, str]]:
    """As `compile_kernels`, but what does not compile is told: by key, why."""
    require_triton()
    binaries: dict[str, bytes] = {}
    records: dict[str, Any] = {}
    keys = {name: _kept_key(kernel, target, sources) for name, kernel in kernels.items()}
    for name, key in keys.items():
        data = kept.get(KIND, key)
        if data is not None:
            record, _, binary = data.partition(b"\n")
            records[name] = json.loads(record)
            binaries[records[name]["file"]] = binary
    missing = {name: kernel for name, kernel in kernels.items() if name not in records}
    failed: dict[str, str] = {}
    if missing:
        with tempfile.TemporaryDirectory(prefix="dsc-triton-") as scratch:
            root, out = Path(scratch, "kernels"), Path(scratch, "out")
            root.mkdir()
            out.mkdir()
            for module, text in sources.items():
                (root / f"{module}.py").write_text(text)

            def keep(name: str, record: dict[str, Any]) -> None:
                binary = (out / record["file"]).read_bytes()
                kept.put(KIND, keys[name], json.dumps(record).encode() + b"\n" + binary)
                records[name], binaries[record["file"]] = record, binary

            failed = _compile_all(missing, target, root, out, keep, progress)
    return dict(sorted(binaries.items())), dict(sorted(records.items())), failed


KIND = "cubins"
COMPILER = ("compile_worker.py", "assembly.py")
"""Our own sources that what is kept of a kernel depends on."""


def _kept_key(kernel: Kernel, target: Target, sources: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a kernel's binary depends on."""
    return {
        "kernel": kernel.as_json(),
        "sources": {module: sources[module] for module in _reached(kernel.module, sources)},
        "target": str(target),
        "triton": version("triton"),
        "settings": {k: v for k, v in kernel_environment().items() if k.startswith(SETTINGS)},
        "compiler": [Path(__file__).with_name(name).read_text() for name in COMPILER],
        "arch": asdict(ARCHS[target.arch]),
    }


def _reached(module: str, sources: Mapping[str, str]) -> list[str]:
    """A module of kernels and those that it imports, by name."""
    found, waiting = set[str](), [module]
    while waiting:
        each = waiting.pop()
        if each in sources and each not in found:
            found.add(each)
            for node in ast.walk(ast.parse(sources[each])):
                if isinstance(node, ast.ImportFrom) and node.module is not None:
                    waiting.append(node.module.rpartition(".")[2])
                elif isinstance(node, ast.Import):
                    waiting += [name.name.rpartition(".")[2] for name in node.names]
    return sorted(found)


def _compile_all(
    kernels: Mapping[str, Kernel],
    target: Target,
    root: Path,
    out: Path,
    keep: Callable[[str, dict[str, Any]], None],
    progress: Progress | None,
) -> dict[str, str]:
    """Give each kernel's record to `keep` as it is made; by key, why others have none.

    The binaries are in the folder `out`. What an interrupted compile has made is kept. A kernel
    that ends the process that compiles it takes those behind it along, which are compiled once more
    without it.
    """
    records = set[str]()
    failed: dict[str, str] = {}
    left, idle = sorted(kernels), 0
    while left:
        before = len(records)
        workers = max(1, min(os.cpu_count() or 1, 8, len(left) // KERNELS_A_WORKER))
        lists = [left[at::workers] for at in range(workers)]
        processes: list[subprocess.Popen[str]] = []
        try:
            for keys in lists:
                processes.append(_start([(k, kernels[k]) for k in keys], target, root, out))
            for keys, process in zip(lists, processes, strict=True):
                assert process.stdout is not None, "the process was started with pipes"
                for line in process.stdout:
                    answer = json.loads(line)
                    if "error" in answer:
                        failed[answer["key"]] = answer["error"]
                    else:
                        keep(answer["key"], answer["record"])
                        records.add(answer["key"])
                    if progress is not None:
                        done = len(records) + len(failed)
                        progress(f"kernels: {target}", done, len(kernels))
                process.stdout.close()
                process.wait()
                ended = next((k for k in keys if k not in records and k not in failed), None)
                if ended is not None:
                    failed[ended] = "the compiling process ended"
        finally:  # nobody waits for what an interrupted compile has not read
            for process in processes:
                process.kill()
                process.wait()
        left = [key for key in left if key not in records and key not in failed]
        idle = idle + 1 if len(records) == before else 0
        if idle == 2:  # no kernel's fault
            failed |= dict.fromkeys(left, "the compiling process ended")
            break
    return failed


def _start(
    kernels: list[tuple[str, Kernel]], target: Target, root: Path, out: Path
) -> subprocess.Popen[str]:
    """A worker that has its request."""
    request = {
        "kernels": {k: v.as_json() for k, v in kernels},
        "kind": target.kind,
        "arch": target.arch,
        "sources": str(root),
        "folder": str(out),
    }
    environment = compiler_environment(out / "cache")
    command = [sys.executable, "-m", "dsc.backends.triton.compile_worker"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None, "the process was started with pipes"
    process.stdin.write(json.dumps(request))
    process.stdin.close()
    return process
