"""What run.py of every artifact does: read the folder, look at what a step is given, write a text.

A backend's `runner.py` adds `Model`, which runs a step. `dsc.runtime.artifact` writes the two as
one file, which needs numpy, tokenizers and what the backend runs on, but no dsc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import pathlib
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TOKENS = ("input_ids", "positions", "lengths", "logits_at")
MACHINES = ("x86_64", "aarch64")
NUMPY = {"f32": "float32", "f16": "float16", "bf16": "uint16", "i64": "int64", "i32": "int32",
         "u8": "uint8"}  # fmt: skip


class Compiled(ABC):
    """A compiled model in a folder. `sizes` are those that no step chooses, by symbol."""

    def __init__(self, folder: str | pathlib.Path, plan: str = "plan.json") -> None:
        """Read the manifest and the plan."""
        self.folder = pathlib.Path(folder)
        self.manifest = described(self.folder)
        self.plan: Any = json.loads((self.folder / plan).read_text())
        limits = self.manifest["limits"]
        self.chunk: int = limits["prefill_chunk"]
        self.context: int = limits["max_context"]
        self.sizes: dict[str, int] = {}

    def pages(self) -> dict[str, Array]:
        """The block table of one sequence, whose blocks are the pages in order; where it has some.

        It sets their sizes.
        """
        inputs = next(iter(self.plan["entries"].values()))["inputs"]
        page = next((dims[1] for _, _, dims, *_ in inputs if dims and dims[0] == [[1, "N"]]), 0)
        if not page:
            return {}
        blocks = -(-self.context // page)
        self.sizes |= {"N": blocks, "M": blocks}
        return {"block_table": np.arange(blocks, dtype=np.int64)[None]}

    def step(self, input_ids: Array, positions: Array, lengths: Array, logits_at: Array) -> Array:
        """Run new tokens [B, S] of sequences that have `lengths` [B] tokens in the cache; all i64.

        Returns float32 logits [B, L, vocab] of the tokens `logits_at` [B, L], indices into S.
        Raises ValueError for what the model was not compiled for, before anything is written.
        """
        given = (input_ids, positions, lengths, logits_at)
        tokens = {n: np.ascontiguousarray(x) for n, x in zip(TOKENS, given, strict=True)}
        logits = self.run(*self.admitted(tokens), tokens)
        if logits.dtype == np.uint16:  # the bits of bfloat16 are the upper half of fp32
            return (logits.astype(np.uint32) << 16).view(np.float32)
        return logits.astype(np.float32, copy=False)

    @abstractmethod
    def run(self, entry: str, sizes: Mapping[str, int], tokens: dict[str, Array]) -> Array:
        """The logits of a step that was admitted."""

    def admitted(self, tokens: Mapping[str, Array]) -> tuple[str, dict[str, int]]:
        """The entry that a step runs, and its sizes by symbol. Raises ValueError."""
        ids, wanted, lengths = (tokens[n] for n in ("input_ids", "logits_at", "lengths"))
        if ids.ndim != 2 or wanted.ndim != 2:
            raise ValueError("input_ids must be i64 [B, S], logits_at i64 [B, L]")
        (batch, new), count = ids.shape, wanted.shape[1]
        sizes, size = {"B": batch, "S": new, "L": count, **self.sizes}, max(new, count)
        longest = int(max(lengths.max(), lengths.min() + new)) if lengths.size else 0
        step = {"step": size, "batch": batch, "context": longest}
        entries, guards = self.plan["entries"], self.manifest["guards"]
        fitting = (
            name
            for name, most in guards
            if name in entries and all(step[k] <= bound for k, bound in most.items())
        )
        entry = next(fitting, list(entries)[-1])
        for name, dtype, dims, *_ in entries[entry]["inputs"]:
            shape = tuple(number(d, sizes) for d in dims)
            array = tokens.get(name, np.empty(0))
            wrong = array.shape != shape or array.dtype != NUMPY[dtype] or not array.size
            if name in tokens and wrong:
                raise ValueError(f"{name} must be {dtype} of shape {list(shape)}, and not empty")
        if longest > self.context or size > self.chunk:
            raise ValueError(f"more than {self.context} tokens, or {self.chunk} at once")
        for name, low, high, what in self.manifest["checks"]:
            least, most = number(low, sizes), number(high, sizes)
            if name in tokens and not least <= tokens[name].min() <= tokens[name].max() <= most:
                raise ValueError(f"{name}: each is {what}, {least} to {most} here")
        return entry, sizes


def mapped_weights(path: pathlib.Path) -> tuple[Array, dict[str, int]]:
    """The bytes of all packed weights, mapped into memory, and where each begins.

    Large pages are asked for: where the file system has them, a product that walks many rows misses
    no translation, and a new process faults in the weights 2 MB at a time. Files stay shared.
    Raises ValueError where the file's header is cut.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with contextlib.suppress(AttributeError, OSError):  # of other systems, and of kernels without
        mapped.madvise(mmap.MADV_HUGEPAGE)
    content = np.frombuffer(mapped, dtype=np.uint8)
    base = 8 + int(content[:8].view("<u8")[0])
    if base > len(content):
        raise ValueError("the weights file is damaged: its header is cut")
    header = json.loads(content[8:base].tobytes())
    places = {n: x["data_offsets"][0] for n, x in header.items() if "data_offsets" in x}
    return content[base:], places


def lacking(needs: Iterable[str]) -> list[str]:
    """What code needs of a CPU and this one, or its operating system, does not give.

    Needs are an architecture, then flags as Linux tells them; where it tells none, none is missing.
    """
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    told = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    flags = told.partition(":")[2].split()
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    others = [x for x in needs if x in MACHINES and x != machine]
    return others or [x for x in needs if flags and x not in (machine, *flags)]


def number(value: Any, sizes: Mapping[str, int]) -> int:
    """A number of a plan: an int, or a sum of products `[int, factor, ...]` at these sizes.

    A factor is a symbol, or `[numerator, denominator]`, of which the whole quotient counts.
    """
    if isinstance(value, int):
        return value
    total = 0
    for term, *factors in value:
        for factor in factors:
            known = isinstance(factor, str)
            top, bottom = (sizes[factor], 1) if known else (number(x, sizes) for x in factor)
            term *= top // bottom
        total += term
    return total


def described(folder: pathlib.Path) -> Any:
    """The manifest of an artifact whose files have the sizes that it records."""
    manifest = json.loads((folder / "dsc.json").read_text())
    for name, facts in manifest["files"].items():
        size, whole = (folder / name).stat().st_size, facts["bytes"]
        if size != whole and name not in ("run.py", "example.py"):
            raise ValueError(f"{name} has {size} bytes, {whole} recorded: compile or copy it again")
    return manifest


def generate(model: Any, ids: Sequence[int], most: int, stop: Collection[int]) -> Iterator[int]:
    """Yield the likeliest tokens after the prompt `ids`: `most`, or fewer before one of `stop`."""
    tokens, start = np.asarray([ids], dtype=np.int64), 0
    for _ in range(most):
        for part in np.split(tokens, range(model.chunk, tokens.shape[1], model.chunk), axis=1):
            positions = np.arange(start, start + part.shape[1], dtype=np.int64)[None]
            logits = model.step(part, positions, positions[:, 0], positions[:, -1:] - start)
            start += part.shape[1]
        if not np.isfinite(logits[0, -1].max()):
            raise ValueError("the largest logit is no number; check with dsc verify OUT --hashes")
        if (token := int(logits[0, -1].argmax())) in stop:
            return
        yield token
        tokens = np.asarray([[token]], dtype=np.int64)


def spell(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], tokens: Iterator[int]
) -> Iterator[str]:
    """Yield the text of `tokens` as it becomes whole: a character may take several."""
    ids, known, shown = list(prompt), len(prompt), decode(prompt)
    for token in tokens:
        ids.append(token)
        if not (text := decode(ids)).endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            ids, shown = (ids[known:], last) if (last := decode(ids[known:])) else (ids, text)
            known = len(ids)
    yield decode(ids)[len(shown) :]


def main(model: Callable[[pathlib.Path], Any]) -> None:
    """Continue a prompt by the likeliest tokens, until a stop id, or so many, or the context."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="at most (default: 64)")
    if (options := parser.parse_args()).max_new_tokens < 1:
        parser.error(f"--max-new-tokens {options.max_new_tokens}: give at least 1")
    folder = pathlib.Path(__file__).absolute().parent  # which may be a folder of links
    try:
        from tokenizers import Tokenizer

        manifest = described(folder)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as problem:
            told = f"tokenizer.json is damaged or not there: {problem}"
            raise ValueError(f"{told}; compile again, or give Model.step ids") from None
        ids = tokenizer.encode(options.prompt.encode().decode()).ids  # UTF-8, or a ValueError
        context, stop = manifest["limits"]["max_context"], manifest["generation"]["eos_token_id"]
        if not ids:
            raise ValueError("the prompt holds no token; give a text to continue")
        if len(ids) >= context:
            told = f"the prompt has {len(ids)} tokens, and the text may have {context} with the"
            raise ValueError(f"{told} answer: shorten it, or compile with a larger --max-context")
        most = min(options.max_new_tokens, context - len(ids))
        made = list[int]()

        def noted(token: int) -> int:
            made.append(token)
            return token

        tokens = map(noted, generate(model(folder), ids, most, stop))
        print(options.prompt, end="", flush=True)
        for text in spell(tokenizer.decode, ids, tokens):
            print(text, end="", flush=True)
        print(flush=True)
        print("length" if len(made) >= most else "stop", file=sys.stderr)
    except (ImportError, OSError, ValueError, RuntimeError) as problem:
        if isinstance(problem, OSError):  # perhaps of standard output: what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(problem, BrokenPipeError):
            parser.exit(2, f"{parser.prog}: error: {problem}\n")
