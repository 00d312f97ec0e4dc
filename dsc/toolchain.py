"""The C++ compiler of this machine, for whoever has code of its own to compile."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache

COMPILERS = ("g++", "c++", "clang++")


def cpp_compiler() -> str:
    """The C++ compiler: `CXX`, or the system's; "" where there is none."""
    tool = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), "")
    return tool if shutil.which(tool) else ""


@cache
def compiler_version(tool: str) -> str:
    """What a C++ compiler says that it is."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
