"""What is carried to a card's machine: one archive beside the checkout, 64 MiB together."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

from dsc import kept

ROOT = Path(__file__).resolve().parents[2]
TINY_CHECKPOINT = ROOT / "models" / "tiny-v3"
MOST_BYTES = 64 << 20
ENDING = ".tar.xz"


def sources() -> str:
    """A hash of the code that an archive is made by and that reads it."""
    return kept.sources("backends/triton", "runtime", "ir")


def packed(folder: Path, archive: Path) -> int:
    """Write a folder's content to an archive; its bytes. Raises `ValueError` for too many."""
    if not archive.name.endswith(ENDING):
        raise ValueError(f"{archive} is to end in {ENDING}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    shutil.make_archive(str(archive)[: -len(ENDING)], "xztar", folder)
    size, beside = archive.stat().st_size, checkout_bytes()
    if size + beside > MOST_BYTES:
        told = f"{archive} has {size} bytes and the checkout {beside}"
        raise ValueError(f"{told}: together {MOST_BYTES} are the most")
    return size


def unpacked(archive: Path, folder: Path) -> Path:
    """Where an archive's content lies now; a folder is its own."""
    if archive.is_dir():
        return archive
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder


def checkout_bytes() -> int:
    """Bytes of the files of the checkout that are tracked; 0 where no git tells."""
    line = ["git", "ls-files", "-z"]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, check=False).stdout
    files = (ROOT / name.decode() for name in told.split(b"\0") if name)
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())
