"""The commands of `bench.gpu`: prepare, run, and, for itself, one part in this process."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import bench.gpu
from bench.gpu.parts import PARTS, measured, run
from dsc.backends.triton.devices import CARDS


def main() -> int:
    """Prepare an archive; or run its parts, write the JSON, and print what the bars say."""
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=bench.gpu.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("verb", choices=("prepare", "run", "model", "part"))
    parser.add_argument("archive", type=Path, help="the archive; of `part`, what it unpacks to")
    parser.add_argument("parts", nargs="*", metavar="PART", help="; ".join(PARTS))
    parser.add_argument("--card", default="H200", choices=sorted(CARDS), help="of `model`")
    parser.add_argument("--target", default="cuda:sm_90")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    asked = parser.parse_intermixed_args()
    unknown = [name for name in asked.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}: {'; '.join(PARTS)}")
    if asked.verb == "prepare":
        from bench.gpu.prepare import prepare

        print(f"{asked.archive}: {prepare(asked.archive, asked.target) / 1e6:.1f} MB")
    elif asked.verb == "model":
        from bench.gpu.modelled import modelled

        print(json.dumps(modelled(asked.archive, asked.card), indent=1))
    elif asked.verb == "part":
        measured(asked.archive, asked.parts[0], asked.out)
    else:
        found = run(asked.archive, asked.parts, asked.out)
        print(json.dumps(found["bars"], indent=1))
        print(f"all figures: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
