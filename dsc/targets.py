"""Targets: what code is made for. `cpu`, `cpu:znver4`, `cuda:sm_90`, `hip:gfx942`."""

from __future__ import annotations

from dataclasses import dataclass

from dsc.errors import UsageError

KNOWN = {
    "cuda": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
    "hip": ("gfx942", "gfx950"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device and, where it matters, its architecture."""

    kind: str
    arch: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.kind in KNOWN


def parse_target(text: str) -> Target:
    """Read a target name. Raises `UsageError` on one that dsc does not know."""
    kind, _, arch = text.partition(":")
    if kind == "cpu":
        return Target("cpu", arch)
    if kind in KNOWN and arch in KNOWN[kind]:
        return Target(kind, arch)
    names = ", ".join(f"{k}:{a}" for k, archs in KNOWN.items() for a in archs)
    raise UsageError(f"unknown target {text!r}", hint=f"one of cpu, cpu:<llvm cpu name>, {names}")
