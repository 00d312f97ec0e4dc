"""All kernels of the 671B, for each target by itself: seconds, memory, spills, instructions.

    python -m bench.triton_targets [TARGET ...] [--quant {fp8,none,int4,int8}] [-- OPTION ...]

Options are those of `dsc compile`, such as `--max-batch 64`. Weights are FP8 if nothing is said.
A target is compiled into an empty cache, twice: the first makes every kernel, the second finds
them. Seconds are the process's, the first without tracing, which is the same for all; memory is
what it and the processes that it starts hold together, read ten times a second. `models/v3.py` has
no weights here, and no GPU is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsc.targets import KNOWN

ROOT = Path(__file__).resolve().parent.parent
TARGETS = tuple(f"{kind}:{arch}" for kind, archs in KNOWN.items() for arch in archs)
MODEL = ("models/v3.py", "--config", "671b", "--weights", "none")
COLD_S, WARM_S, BYTES = 120.0, 15.0, 4 << 30
LARGE = 64
"""Rows of a tile from which on what multiplies is looked at."""
QUANTS = ("fp8", "none", "int4", "int8")
UNITS: Mapping[str, str] = {
    "sm_80": "mma.sync f16", "sm_86": "mma.sync f16", "sm_89": "mma.sync e4m3",
    "sm_90": "wgmma e4m3", "sm_100": "tcgen05 f8f6f4", "sm_120": "mma.sync e4m3",
    "gfx942": "v_mfma fp8_fp8", "gfx950": "v_mfma f8f6f4",
}  # fmt: skip
"""What multiplies rows in FP8 by weights in FP8 in tiles of `LARGE` rows and more."""
PLAIN_UNITS: Mapping[str, str] = {
    "sm_80": "mma.sync bf16", "sm_86": "mma.sync bf16", "sm_89": "mma.sync bf16",
    "sm_90": "wgmma bf16", "sm_100": "tcgen05 f16", "sm_120": "mma.sync bf16",
    "gfx942": "v_mfma bf16", "gfx950": "v_mfma bf16",
}  # fmt: skip
"""What multiplies rows in bf16, attention's too; weights in codes were made numbers before."""


def measure(
    targets: Sequence[str] = TARGETS, options: Sequence[str] = (), quant: str = "fp8"
) -> dict[str, Any]:
    """The figures of each target, and whether they hold."""
    found = {target: measured(target, options, quant) for target in targets}
    return {"ok": all(each["ok"] for each in found.values()), **found}


def measured(target: str, options: Sequence[str], quant: str) -> dict[str, Any]:
    """A cold and a warm compile for one target, and what its binaries say."""
    options, fp8 = ["--quant", quant, *options], quant == "fp8"
    with tempfile.TemporaryDirectory(prefix="dsc-targets-") as place:
        folder = Path(place)
        cold, warm = (compiled(target, folder, options) for _ in range(2))
        stored = sum(p.stat().st_size for p in (folder / "out").rglob("*") if p.is_file())
        arch = target.partition(":")[2]
        records = json.loads((folder / "out" / "triton" / arch / "kernels.json").read_text())
        plan = json.loads((folder / "out" / "triton" / arch / "plan.json").read_text())
    spilled = sorted(key for key, record in records.items() if record["spill_bytes"])
    large = large_products(plan["meta"]["kernels"], fp8)
    units = (UNITS if fp8 else PLAIN_UNITS)[arch]
    others = sorted(key for key in large if units not in records[key]["matrix"])
    seconds = round(cold["seconds"] - cold["phases"].get("tracing", 0.0), 1)
    ok = seconds <= COLD_S and warm["seconds"] <= WARM_S and cold["bytes"] <= BYTES
    return {
        "ok": ok and not spilled and not others,
        "kernels": len(records),
        "large_products": len(large),
        "artifact_bytes": stored,
        "cold_s": seconds,
        "warm_s": round(warm["seconds"], 1),
        "phases": [cold["phases"], warm["phases"]],
        "gigabytes": round(cold["bytes"] / 1e9, 2),
        "spilled": spilled,
        "in other units": others,
    }


def large_products(kernels: Mapping[str, Any], fp8: bool) -> list[str]:
    """Keys of what multiplies in tiles of `LARGE` rows; in FP8 of rows and weights in FP8 alone."""
    return [
        key
        for key, kernel in kernels.items()
        if kernel["constants"].get("BLOCK_M", 0) >= LARGE
        and (not fp8 or "f8e4m3_rows" in kernel["function"])
    ]


def compiled(target: str, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Seconds, bytes at most, and the phases of a compile over the cache in a folder."""
    line = [sys.executable, "-m", "dsc", "compile", *MODEL, "--backend", "triton"]
    line += [*options, "--target", target, "--force", "--json", "-o", str(folder / "out")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    start, most = time.perf_counter(), 0
    with (folder / "told").open("w") as told:
        process = subprocess.Popen(line, stdout=told, env=environment, cwd=ROOT)
        while process.poll() is None:
            most = max(most, sum(map(resident, family(process.pid))))
            time.sleep(0.1)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    phases = json.loads((folder / "told").read_text())["phases"]
    return {"seconds": seconds, "bytes": most, "phases": phases}


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # it has ended
                continue
    return found


def resident(pid: int) -> int:
    """Bytes that a process holds, of what it shares its part; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("Pss:")), 0)


if __name__ == "__main__":
    given = [*sys.argv[1:], "--"]
    end = given.index("--")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    parser.add_argument("--quant", choices=QUANTS, default=QUANTS[0])
    asked = parser.parse_args(given[:end])
    found = measure(asked.targets, given[end + 1 : -1], asked.quant)
    print(json.dumps(found, indent=1))
