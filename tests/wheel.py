"""Build the wheel from what git tracks, and use it from an environment that has no checkout.

`python -m tests.wheel [FOLDER]` puts the wheel into FOLDER (out/dist by default), checks that each
file of the packages is in it, installs it into a new environment that borrows this one's
dependencies, and compiles and runs a program there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

from tests.test_conventions import ROOT, SIBLINGS, TRACKED, name

USE = """
import sys, torch, dsc
from pathlib import Path
from dsc.models.configs import TINY_CHECKPOINT, config

assert Path(dsc.__file__).is_relative_to(sys.prefix), dsc.__file__
assert (TINY_CHECKPOINT / "model.safetensors").is_file() and config("671b").hidden_size == 7168
Path("g.dsc").write_text("graph main(%x: f32[B,8]) { %e = exp %x\\n %y = neg %e\\n return %y }")
x = torch.ones(2, 8)
model = dsc.compile("g.dsc", backend=sys.argv[1])
model.save("out")
y = dsc.load("out").run({"x": x})["y"]
assert torch.allclose(y, -x.exp()), y
"""


def build(folder: Path) -> Path:
    """The wheel of what git tracks, in `folder`. Raises `CalledProcessError`."""
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        for path in (*TRACKED, *(ROOT / "dsc" / sibling for sibling in SIBLINGS)):
            target = source / name(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)
        built = Path(temporary) / "dist"
        line = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(built)]
        subprocess.run([sys.executable, "-m", *line, str(source)], check=True)
        (wheel,) = built.iterdir()
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, folder / wheel.name))


def missing(wheel: Path) -> list[str]:
    """Files of the packages that are not in the wheel."""
    within = zipfile.ZipFile(wheel).namelist()
    parts = [path.relative_to(ROOT).parts for path in TRACKED]
    ours = {"/".join(p[p[0] == "dsc" :]) for p in parts if p[0] in ("dsc", *SIBLINGS)}
    return sorted({f"dsc/{path}" for path in ours} - set(within))


def use(wheel: Path, backend: str) -> None:
    """Install the wheel into a new environment and run a program there."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "env"
        venv.create(home, with_pip=False)
        python = home / "bin" / "python"
        line = ["pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
        subprocess.run([sys.executable, "-m", *line], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        borrowed = home / "lib" / version / "site-packages" / "borrowed.pth"
        borrowed.write_text(sysconfig.get_path("purelib"))
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        dsc = str(home / "bin" / "dsc")
        for command in ([str(python), "-c", USE, backend], [dsc, "--version"]):
            subprocess.run(command, check=True, cwd=temporary, env=environment)


if __name__ == "__main__":
    made = build(Path(*sys.argv[1:2] or ["out/dist"]))
    lost = missing(made)
    if lost:
        sys.exit(f"not in the wheel: {', '.join(lost)}")
    use(made, "tvm" if sys.platform == "linux" else "reference")
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB, used from a new environment")
