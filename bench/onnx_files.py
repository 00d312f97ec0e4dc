"""Exports as files: graphs of whole models without weights, kills at random points, streams.

    python -m bench.onnx_files graphs       every released size: seconds, onnx.checker by path
    python -m bench.onnx_files kills        exports that are killed, for every server
    python -m bench.onnx_files streams      a checkpoint of gigabytes: memory, seconds a GB written
    python -m bench.onnx_files              the first two, which are the bar

A graph without weights says where each weight would lie, so a sparse file of that size serves
onnx.checker. Kills come at random times of a save, in forks of a process that has compiled the
model: what stands in its place is whole, or nothing is, and the next one leaves nothing beside it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny-v3"
GRAPHS = ("16b", "236b", "moonlight", "671b")
SECONDS = 60
"""What the graph of 671B may take, of a processor that is free."""
SERVERS = (None, "genai", "triton-server")
KILLS = 20
SHARD = 2_000_000
"""Bytes in a file, so that the tiny model has several."""
STREAMED = ("none", "int8", "int4")
A_GB, SPARE = 60.0, 10**9
"""Seconds that a gigabyte may take, and bytes beside three times the largest tensor."""
Figures = dict[str, Any]


def sparse(folder: Path) -> int:
    """Put empty files where the models of an export have their weights; their bytes together."""
    from dsc.backends.onnxruntime.external_data import external_tensors

    sizes: dict[Path, int] = {}
    for path in folder.rglob("*.onnx"):
        for each in external_tensors(path.read_bytes(), path.name):
            file = path.parent / each["location"]
            sizes[file] = max(sizes.get(file, 0), each["offset"] + each["length"])
    for file, size in sizes.items():
        with file.open("wb") as empty:
            empty.truncate(size)
    return sum(sizes.values())


def graph(config: str, place: Path) -> Figures:
    """Export one without weights, and have onnx look at every model of it by its path."""
    import onnx

    out = place / config
    line = [sys.executable, "-m", "dsc", "export", str(ROOT / "models" / "v3.py")]
    line += ["--config", config, "--weights", "none", "-o", str(out)]
    environment = {**os.environ, "DSC_CACHE": "off", "OMP_NUM_THREADS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    size = sparse(out)
    for path in out.rglob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    spent = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    models = {path.name: path.stat().st_size for path in sorted(out.rglob("*.onnx"))}
    shutil.rmtree(out)
    return {"wall_s": wall, "cpu_s": spent, "weights_gb": size / 1e9, "models": models}


def graphs() -> Figures:
    """Every released size."""
    with tempfile.TemporaryDirectory() as place:
        found = {config: graph(config, Path(place)) for config in GRAPHS}
    return {"ok": found["671b"]["cpu_s"] < SECONDS, "graphs": found}


def _forked(save: Any) -> int:
    """A process that saves."""
    child = os.fork()
    if child:
        return child
    try:
        save()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kills(server: str | None, times: int = KILLS, seed: int = 0) -> Figures:
    """Kill exports for a server at random points; the first half have one in their place."""
    from dsc.exporting import exported
    from dsc.runtime.artifact import check_hashes

    options = {"max_shard_size": SHARD} | ({"server": server} if server else {})
    compiled = exported(TINY, dtype="fp32", backend_options=options)
    draw, wrong = random.Random(seed), list[str]()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "in" / "out"

        def save() -> None:
            compiled.save(out, force=True)

        save()
        start = time.perf_counter()
        os.waitpid(_forked(save), 0)
        seconds, died = time.perf_counter() - start, 0
        for number in range(times):
            there = number < times // 2
            if not there:
                shutil.rmtree(out, ignore_errors=True)
            child = _forked(save)
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            died += killed
            if out.exists():
                check_hashes(out)
            elif there or not killed:
                wrong.append(f"kill {number}: no export is there")
        save()
        check_hashes(out)
        left = sorted(path.name for path in out.parent.iterdir())
        outside = sorted(path.name for path in Path(place).iterdir())
    ok = not wrong and died > 0 and left == ["out"] and outside == ["in"]
    return {"ok": ok, "killed": died, "save_s": seconds, "wrong": wrong, "left": left}


def stream(quant: str, out: Path, layers: int = 6) -> Figures:
    """Export Moonlight's released shapes with a few layers, its weights made as they are read."""
    from bench.large import Anonymous
    from bench.synthetic import SyntheticSource, synthetic
    from dsc.exporting import exported

    options = {} if quant == "none" else {"quant": quant}
    with Anonymous() as memory:
        compiled = exported(synthetic("moonlight", layers), max_batch=1, **options)
        start, cpu = time.perf_counter(), time.process_time()
        compiled.save(out, force=True)
        seconds, spent = time.perf_counter() - start, time.process_time() - cpu
    layered: Any = compiled.program.source
    source = next(s for s in layered.layers if isinstance(s, SyntheticSource))
    gigabytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e9
    allowed = 3 * source.largest + SPARE
    return {
        "ok": memory.peak <= allowed and seconds / gigabytes <= A_GB,
        "gb": gigabytes, "anonymous_gb": memory.peak / 1e9, "allowed_gb": allowed / 1e9,
        "s_a_gb": seconds / gigabytes, "cpu_s_a_gb": spent / gigabytes,
    }  # fmt: skip


def streams() -> Figures:
    """Each number format in a process of its own."""
    found: Figures = {}
    for quant in STREAMED:
        with tempfile.TemporaryDirectory(dir=ROOT / "bench") as place:
            line = [sys.executable, "-m", "bench.onnx_files", "stream", quant, f"{place}/out"]
            told = subprocess.run(line, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
        found[quant] = json.loads(told.stdout.splitlines()[-1])
    return {"ok": all(each["ok"] for each in found.values()), **found}


def bar() -> Figures:
    """Graphs, then kills for every server."""
    found = {"graphs": graphs(), **{str(server): kills(server) for server in SERVERS}}
    return {"ok": all(each["ok"] for each in found.values()), **found}


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "bar"
    if what == "kills":
        print(json.dumps({str(server): kills(server) for server in SERVERS}, indent=1))
    elif what == "stream":
        print(json.dumps(stream(sys.argv[2], Path(sys.argv[3]))))
    else:
        print(json.dumps({"graphs": graphs, "streams": streams, "bar": bar}[what](), indent=1))
