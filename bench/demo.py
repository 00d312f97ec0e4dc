"""The demonstration behind `make demo`: kernels for a GPU that is not here, then text on what is.

Three commands of the command line, printed before they run: compile `models/v3.py` to sm_90 cubins,
compile the same tiny trained model for the best backend that runs on this machine, and continue a
prompt with it. `python -m bench.demo` runs it alone.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("bench") / "out"
PROMPT = "In the beginning"


def step(title: str, *arguments: str) -> None:
    """Print a command of dsc as a user would type it, and run it in the checkout."""
    print(f"\n# {title}\n$ {shlex.join(['dsc', *arguments])}", flush=True)
    line = [sys.executable, "-c", "from dsc.cli import main; main()", *arguments]
    status = subprocess.run(line, cwd=ROOT, check=False).returncode
    if status != 0:
        sys.exit(status)


def kernels(folder: Path) -> Sequence[Path]:
    """Return the compiled GPU code in an artifact."""
    return sorted(path for path in folder.rglob("*") if path.suffix in {".cubin", ".hsaco"})


def main() -> None:
    """Run the three steps."""
    gpu, here = OUT / "v3-triton", OUT / "v3"
    step(
        "Triton kernels for sm_90; no GPU is asked for",
        *("compile", "models/v3.py", "--backend", "triton", "--target", "cuda:sm_90"),
        *("--force", "-o", str(gpu)),
    )
    found = kernels(ROOT / gpu)
    if not found:
        sys.exit(f"no cubin under {gpu}")
    total = sum(path.stat().st_size for path in found)
    print(f"{len(found)} cubins, {total / 1e3:.0f} kB, for example {found[0].name}")
    step(
        "the same model, with its trained weights, for the best backend that runs here",
        *("compile", "models/v3.py", "--force", "-o", str(here)),
    )
    step(
        "continue a prompt with it",
        *("generate", str(here), "--prompt", PROMPT, "--max-new-tokens", "48", "--stats"),
    )


if __name__ == "__main__":
    main()
