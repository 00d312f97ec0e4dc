"""Files of a checkpoint from somebody who means harm: nothing is imported, opened or run for them.

    python -m bench.hostile_files [--files N] [--seconds S] [--reader NAME] [--seed N]
    python -m bench.hostile_files --files 100000 --keep bench/out/hostile_files.jsonl
    python -m bench.hostile_files --told bench/out/hostile_files.jsonl

For each reader valid files are mutated (`hostile_mutations.py`) and read in a process of their own
under an audit hook of Python. A file is a failure where something was imported, opened, started or
asked of the network that is not the folder's or an installed package's own; where reading ends in
anything but a `DscError` that a terminal can print, hangs or takes memory without bound; and where
a configuration is read as something else than it says: keys that only make loaders do something
must leave the model as it was, every other key that the class declares must hold what the file
says. What is left of a file is not repaired: `seed` and number of a failure make it again.

With `--keep` every thousand files leave a line of JSON, and a run goes on behind the last line that
its seed has; `--told` adds such lines up.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.hostile_mutations import BAIT
from dsc.errors import DscError

ROOT = Path(__file__).resolve().parent.parent
START = 180.0
SECONDS = 10.0
"""What reading one file may take, of a processor."""
MEMORY = 3 << 30
"""Address space that a worker may take beyond what it has once everything is imported."""
MAX_MESSAGE = 20_000
KEPT = 1000
"""Files of a line of what is kept."""
GOOD = ("read", "refused", "bounded")
"""What may come of a file."""
MODULES = (".py", ".pyc", ".so")
"""How the files end that installed packages import."""
FOLDER = os.O_DIRECTORY
SCRATCH = next((p for p in ("/dev/shm",) if os.access(p, os.W_OK)), None)
"""Where files are written: memory, since folders on a disk take longer than reading does."""
NETWORK = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.")
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
          "pty.spawn", "os.startfile")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link",
           "os.symlink", "os.truncate", "shutil.")  # fmt: skip


Reader = Callable[[Path, random.Random], Generator[None, None, str]]
"""Writes files to a folder, yields, and reads them: what came of it."""


class Watch:
    """An audit hook that notes what no file may cause, while it is `armed`.

    `folder` is where files may be read and written. Modules may be imported from the installed
    packages that reading the valid files took, by names that are in no file; of the standard
    library none that was not imported by then. Of what packages keep beside their modules nothing
    may be opened that was not before.
    """

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self.armed = False
        self._homes = (str(folder.resolve()), os.path.realpath(tempfile.gettempdir()), "/dev/null")
        places = {sys.prefix, sys.base_prefix, str(ROOT), *(p for p in sys.path if p)}
        self._libraries = tuple({os.path.realpath(p) for p in places} | places)
        self.roots: frozenset[str] = frozenset()
        self.opened: set[str] = set()
        sys.addaudithook(self._noted)

    def settle(self) -> None:
        """Take the packages that are imported by now for those that reading takes."""
        roots = {name.partition(".")[0] for name in sys.modules}
        self.roots = frozenset(roots - sys.stdlib_module_names)

    def _noted(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            if event == "open" and isinstance(arguments[0], str):
                self.opened.add(arguments[0])
            return
        self.armed = False
        try:
            if self._is_foreign(event, arguments):
                self.seen.append(f"{event} {arguments!r:.300}")
        finally:
            self.armed = True

    def _is_foreign(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "import":
            name = str(arguments[0])
            known = name in sys.modules or name.partition(".")[0] in self.roots
            return BAIT in name or not known
        if event == "open":
            path, mode, flags = arguments
            return not isinstance(path, int) and not self._may_open(path, mode, flags)
        if event in ("os.listdir", "os.scandir"):
            where = arguments[0]
            return not isinstance(where, int) and not self._may_open(where, "r", FOLDER)
        if event in ("compile", "exec"):  # templates are compiled, and are their process's affair
            return arguments[1:] != ("<template>",) and BAIT in _code(arguments[0])
        if event == "ctypes.dlopen":
            name = arguments[0]
            return name is not None and not self._is_library(os.fsdecode(name))
        if event.startswith(CHANGES):
            held = arguments[-1]  # a folder that was opened before, which was noted then
            if isinstance(held, int) and held >= 0 and event in ("os.remove", "os.rmdir"):
                return "/" in os.fsdecode(arguments[0])
            return not self._may_open(arguments[0], "w", os.O_WRONLY)
        return event.startswith((*NETWORK, *STARTS)) or event in ("pickle.find_class", "os.putenv")

    def _may_open(self, path: Any, mode: str | None, flags: int) -> bool:
        where = os.path.realpath(os.fsdecode(path or "."))
        own = any(where == home or where.startswith(home + "/") for home in self._homes)
        if own and not self._is_library(where):
            return True
        writes = any(sign in (mode or "") for sign in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
        if writes or BAIT in where or not self._is_library(where):
            return False
        return flags == FOLDER or where.endswith(MODULES) or path in self.opened

    def _is_library(self, where: str) -> bool:
        found = os.path.realpath(where)
        return any(found.startswith(place + "/") for place in self._libraries)


def _code(source: Any) -> str:
    """The text of a program, or the names and texts of compiled one, where it is no file's."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source).decode("utf-8", "replace")
    if isinstance(source, str):
        return source
    name = getattr(source, "co_filename", "")
    if os.path.isabs(name) or name.startswith("<frozen") or name == "<template>":
        return BAIT if BAIT in name else ""
    return f"{getattr(source, 'co_names', '')} {getattr(source, 'co_consts', '')}"


def reads(reader: Reader, watch: Watch, folder: Path, seed: str) -> str:
    """What came of one file: "read", "refused", "bounded", or words that say what is wrong."""
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
    reading = reader(folder, random.Random(seed))
    next(reading)
    watch.seen.clear()
    try:
        watch.armed = True
        next(reading)
        told = "read nothing"
    except StopIteration as done:
        told = done.value
    except BaseException as problem:
        watch.armed = False
        told = problem_of(problem)
    finally:
        watch.armed = False
    return f"caused {watch.seen[0]}" if watch.seen else told


def worker(names: Sequence[str], seed: int, first: int, folder: Path) -> None:
    """Read files from `first` on, a line of JSON after each. Ends by a signal."""
    from bench.hostile_readers import READERS, prepare

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what readers print is none of them
    watch = Watch(folder)
    prepare(folder)
    watch.settle()
    gc.collect()
    gc.freeze()  # what is imported is no garbage, and need not be looked through again
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("begins", file=answers, flush=True)
    for done in itertools.count(first):
        name, number = names[done % len(names)], done // len(names)
        outcome = reads(READERS[name], watch, folder, f"{name} {seed} {number}")
        print(json.dumps(outcome), file=answers, flush=True)


def problem_of(problem: BaseException) -> str:
    """What an error is: "refused" if it is one of dsc's that a terminal can print."""
    if not isinstance(problem, DscError):
        import traceback

        frames = traceback.extract_tb(problem.__traceback__)
        ours = [f for f in frames if str(ROOT) in f.filename and "/.venv/" not in f.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"raised {type(problem).__name__}: {problem!s:.200} at {place}"
    return unprintable(str(problem)) or "refused"


def unprintable(text: str) -> str:
    """What keeps a text from being shown on a terminal, or ""."""
    if len(text) > MAX_MESSAGE:
        return f"a message of {len(text)} characters: {text:.60}"
    odd = [c for c in text if not (c.isprintable() or c in "\n\t")]
    return f"a message with {odd[0]!r}: {text!r:.200}" if odd else ""


@contextmanager
def _started(
    names: Sequence[str], seed: int, first: int, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    code = f"from bench.hostile_files import worker; from pathlib import Path; " \
           f"worker({tuple(names)!r}, {seed}, {first}, Path({str(folder)!r}))"  # fmt: skip
    environment = os.environ | {"TMPDIR": str(folder.parent / "tmp"), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd=ROOT, env=environment, start_new_session=True, bufsize=0,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Counted:
    """What came of the files of a reader: counts by outcome, and the first failure of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, list[Any]] = {}

    def add(self, told: str, named: str) -> None:
        """Count a file, called `named` where something is wrong with it."""
        self.counts["files"] += 1
        if told in GOOD:
            self.counts[told] += 1
        else:
            self.failures.setdefault(told[:120], [0, f"{named}: {told}"])[0] += 1

    def take(self, line: Mapping[str, Any]) -> None:
        """Add what `told` gave of other files."""
        self.counts.update({name: line.get(name, 0) for name in ("files", *GOOD)})
        for kind, (count, first) in line["failures"].items():
            self.failures.setdefault(kind, [0, first])[0] += count

    def told(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"ok": not self.failures, **+self.counts, "failures": self.failures}


def measure(
    names: Sequence[str],
    files: int,
    seconds: float,
    seed: int = 1,
    first: int = 0,
    kept: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Counts by outcome for each reader, and the first failure of each kind.

    The readers take turns, so many `files` each from number `first` on, or as many as `seconds`
    allow. `kept` is given what came of every thousand files, and of the rest.
    """
    found = {name: Counted() for name in names}
    part = {name: Counted() for name in names}
    done, begun, last = first * len(names), 0.0, (first + files) * len(names)
    started = time.monotonic()

    def noted(told: str) -> None:
        nonlocal done, started
        name, number = names[done % len(names)], done // len(names)
        part[name].add(told, f"seed {seed}, file {number}")
        done += 1
        if not done % (KEPT * len(names)) or done == last:
            flush()

    def flush() -> None:
        nonlocal started
        took, started = time.monotonic() - started, time.monotonic()
        for name, counted in part.items():
            line = counted.told()
            found[name].take(line)
            where = {"reader": name, "seed": seed, "end": done // len(names)}
            if kept is not None and line.get("files"):
                kept(where | line | {"seconds": round(took / len(names), 2)})
            part[name] = Counted()

    def goes_on() -> bool:
        return done < last and (not begun or time.monotonic() - begun < seconds)

    with tempfile.TemporaryDirectory(prefix="dsc-hostile-", dir=SCRATCH) as place:
        folder = Path(place) / "model"
        folder.mkdir()
        (Path(place) / "tmp").mkdir()
        while goes_on():
            with _started(names, seed, done, folder) as process:
                if not _line(process, START):
                    raise RuntimeError("the worker does not start")
                begun = begun or time.monotonic()
                while goes_on():
                    line = _line(process, SECONDS)
                    if line:
                        noted(json.loads(line))
                        continue
                    bounded = names[done % len(names)] == "template"  # has limits of its own
                    hangs = process.poll() is None
                    wrong = "hangs" if hangs else f"ends by {process.returncode}"
                    noted("bounded" if bounded else wrong)
                    break
    flush()
    took = round(time.monotonic() - begun, 1)
    return {name: counted.told() | {"seconds": took} for name, counted in found.items()}


def added_up(file: Path) -> dict[str, dict[str, Any]]:
    """What the lines of a kept file say in all, for each reader and seed; `end` is the last."""
    found: dict[str, tuple[Counted, dict[str, float]]] = {}
    for text in file.read_text().splitlines() if file.exists() else ():
        line = json.loads(text)
        counted, rest = found.setdefault(
            f"{line['reader']} {line['seed']}", (Counted(), {"seconds": 0.0})
        )
        counted.take(line)
        rest |= {"seconds": round(rest["seconds"] + line["seconds"], 1), "end": line["end"]}
    return {name: counted.told() | rest for name, (counted, rest) in found.items()}


def keep(file: Path, name: str, files: int, seconds: float, seed: int) -> dict[str, Any]:
    """Measure the files of a reader up to number `files` that `file` has not, and add them to it.

    Gives what the whole file says of this reader and seed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)

    def kept(line: dict[str, Any]) -> None:
        with file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    key = f"{name} {seed}"
    first = added_up(file).get(key, {"end": 0})["end"]
    if first < files:
        measure([name], files - first, seconds, seed, first, kept)
    return added_up(file)[key]


def _line(process: subprocess.Popen[bytes], patience: float) -> bytes:
    """The next line of a worker, or b"" where it ended or took too long. Its pipe has no buffer.

    Too long is `patience` seconds of processor time, or as long asleep: a machine with other work
    to do, or one that stops processes for a while, is no fault of a file.
    """
    assert process.stdout is not None, "it is started with a pipe"
    line, asleep, (_, begun) = b"", 0.0, _state(process.pid)
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not waiting.select(1.0):
                state, used = _state(process.pid)
                asleep = asleep + 1.0 if state == "S" else 0.0
                if max(asleep, used - begun) > patience:
                    return b""
                continue
            part = process.stdout.readline()
            if not part:
                return b""
            line += part
    return line


def _state(pid: int) -> tuple[str, float]:
    """Whether a process runs (R), sleeps (S), is stopped (T) or so, and its processor seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bar() -> dict[str, Any]:
    """Two minutes of files for each reader, or 100,000: nothing foreign is done for any of them."""
    from bench.hostile_readers import NAMES

    found = {name: measure([name], files=100_000, seconds=120)[name] for name in NAMES}
    return {"ok": all(each["ok"] for each in found.values()), **found}


def main() -> None:
    """Measure, and print the counts as JSON; exit with 1 on any failure."""
    from bench.hostile_readers import NAMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000, help="of each reader")
    parser.add_argument("--seconds", type=float, default=600.0, help="for each reader at most")
    parser.add_argument("--reader", choices=NAMES, action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="go on in this file")
    parser.add_argument("--told", type=Path, metavar="FILE", help="only add up what was kept")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    if given.told is not None:
        found = added_up(given.told)
    else:
        for name in given.reader or NAMES:
            if given.keep is not None:
                found[name] = keep(given.keep, name, given.files, given.seconds, given.seed)
            else:
                found |= measure([name], given.files, given.seconds, given.seed)
    print(json.dumps(found, indent=1))
    sys.exit(any(not each["ok"] for each in found.values()))


if __name__ == "__main__":
    main()
