"""`dsc doctor`: what this machine can run, and what to install for the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass

from dsc.cli import console, options
from dsc.hardware import Cpu, Gpu
from dsc.targets import KNOWN

_IMPORT_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What a backend needs: a package, how it is called in the index, what it gives."""

    backend: str
    package: str
    distribution: str
    compiles_for: str
    needs_gpu: bool = False

    def runs_on(self, gpus: tuple[Gpu, ...]) -> str:
        """Targets that there are kernels for and a launcher."""
        if not self.needs_gpu:
            return "cpu"
        known = {f"{kind}:{arch}" for kind, archs in KNOWN.items() for arch in archs}
        return ", ".join(sorted({gpu.target for gpu in gpus} & known))


@dataclass(frozen=True, slots=True)
class Finding:
    """The state of one backend on this machine. `version` is empty where it cannot be used."""

    backend: str
    version: str
    runs_on: str
    compiles_for: str
    to_do: str


TOOLCHAINS = (
    Toolchain("reference", "torch", "torch", "cpu"),
    Toolchain("tvm", "tvm", "apache-tvm", "cpu, cpu:NAME of an LLVM cpu"),
    Toolchain("onnxruntime", "onnxruntime", "onnxruntime", "ONNX"),
    Toolchain(
        "triton",
        "triton",
        "triton",
        ", ".join(f"{kind}:{' '.join(archs)}" for kind, archs in KNOWN.items()),
        True,
    ),
)


def doctor(json: options.Json = False) -> None:
    """Say what this machine can run, and what to install for the rest.

    Each toolchain is imported in a process of its own, so one that is damaged shows as damaged.

    Example: dsc doctor --json
    """
    from dsc.hardware import cpu, gpus

    with console.progress_bar() as progress:
        findings = []
        for done, toolchain in enumerate(TOOLCHAINS):
            progress(f"importing {toolchain.package}", done, len(TOOLCHAINS))
            findings.append(examine(toolchain, gpus()))
    if json:
        machine = {"cpu": asdict(cpu()), "gpus": [asdict(gpu) for gpu in gpus()]}
        console.print_json(machine | {"backends": [asdict(finding) for finding in findings]})
        return
    _show(cpu(), gpus(), findings)


def examine(toolchain: Toolchain, gpus: tuple[Gpu, ...]) -> Finding:
    """Import the toolchain in a fresh process and judge what it gives on this machine."""
    version, problem = imported_version(toolchain.package)
    if problem:
        return Finding(toolchain.backend, "", "", "", _remedy(toolchain, problem))
    here, needed = toolchain.runs_on(gpus), "running needs an NVIDIA GPU that is compiled for"
    to_do = "" if here else f"{needed}; compiling needs none"
    return Finding(toolchain.backend, version, here, toolchain.compiles_for, to_do)


def imported_version(package: str) -> tuple[str, str]:
    """Return (version, "") of a package that imports, or ("", why it does not)."""
    line = f"import {package} as p; print(p.__version__)"
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", line],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"importing it took more than {_IMPORT_TIMEOUT_S} s"
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1], ""
    return "", (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _remedy(toolchain: Toolchain, problem: str) -> str:
    if problem.startswith("ModuleNotFoundError") and f"'{toolchain.package}'" in problem:
        return f"pip install {toolchain.distribution}"
    return f"pip install --force-reinstall {toolchain.distribution}  ({problem})"


def _show(cpu: Cpu, gpus: tuple[Gpu, ...], findings: list[Finding]) -> None:
    from rich.table import Table

    out = console.stdout()
    extensions = " ".join(cpu.extensions) or "no vector extension that dsc uses"
    out.print(f"cpu  {cpu.name}, {cpu.cores} cores, {console.human_bytes(cpu.memory)}")
    out.print(f"     {extensions}")
    for gpu in gpus:
        out.print(f"gpu  {gpu.name}, {gpu.target}, {console.human_bytes(gpu.memory)}")
    if not gpus:
        out.print("gpu  none that a driver answers for")
    table = Table("backend", "version", "runs on", "compiles for", "to do", box=None)
    for finding in findings:
        row = (finding.version or "missing", finding.runs_on or "-", finding.compiles_for or "-")
        table.add_row(finding.backend, *row, finding.to_do)
    out.print(table)
