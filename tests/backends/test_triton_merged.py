"""Launches that a product makes unnecessary: norms and spans of attention that it does as it reads.

Kernels run with a GPU's tiles, over memory that is poisoned and watched, in two orders of programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from dsc.backends.triton.access import TracedExecutable
from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.program import lower_program
from dsc.backends.triton.prologue import NORMED_ROWS
from dsc.backends.triton.schedule import resolve
from dsc.backends.triton.worker import INTERPRETED
from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.runtime.plan import EntryPlan

pytest.importorskip("triton")

TARGET = "cuda:sm_90"
ATTENTION = "%a = latent_attention %q, %r, %c, %k, %n {{scale=0.14}} : {t}[{b},{s},3,40]"
TEXTS: dict[str, tuple[int, str]] = {
    "norm": (1, """(%x: bf16[3,70], %g: bf16[70], %w: bf16[33,70], %b: bf16[33]) {
      %a = rms_norm %x, %g {eps=1e-06} : bf16[3,70]
      %y = linear %a, %w, %b : bf16[3,33]
      return %y
    }"""),
    "norm of a part, in fp32, and a residual": (1, """(%z: f32[1,5,90], %g: f32[70],
        %w: f32[33,70], %r: f32[1,5,33]) {
      %x, %u = split %z {axis=2, sizes=[70,20]} : f32[1,5,70], f32[1,5,20]
      %a = rms_norm %x, %g {eps=1e-05} : f32[1,5,70]
      %y = fused %a, %w, %r {body=graph body(%a: f32[1,5,70], %w: f32[33,70], %r: f32[1,5,33]) {
        %m = linear %a, %w
        %s = add %r, %m
        return %s
      }} : f32[1,5,33]
      return %y
    }"""),
    "norm that several read": (3, """(%x: bf16[2,3,70], %g: f32[70], %w: bf16[33,70],
        %v: bf16[20,70]) {
      %a = rms_norm %x, %g {eps=1e-06} : bf16[2,3,70]
      %f = reshape %a {shape=[6,70]} : bf16[6,70]
      %y = linear %f, %w : bf16[6,33]
      %z = linear %a, %v : bf16[2,3,20]
      %s = silu %a : bf16[2,3,70]
      return %y, %z, %s
    }"""),
    "norm before a router": (4, """(%x: bf16[4,40], %g: bf16[40], %w: bf16[6,40],
        %u: bf16[6,28,40], %d: bf16[6,40,14]) {
      %a = rms_norm %x, %g {eps=1e-06} : bf16[4,40]
      %i, %p = route %a, %w {score="sigmoid", top_k=2, normalise=true} : i64[4,2], f32[4,2]
      %y = experts %a, %i, %p, %u, %d : bf16[4,40]
      return %y
    }"""),
    "norm that is read otherwise first": (3, """(%x: f32[3,70], %g: f32[70], %w: f32[33,70]) {
      %a = rms_norm %x, %g {eps=1e-06} : f32[3,70]
      %s = silu %a : f32[3,70]
      %y = linear %a, %w : f32[3,33]
      return %y, %s
    }"""),
    **{
        f"queries turned, {layout}": (1, """(%q: bf16[2,3,5,40], %x: bf16[2,3,5,24], %p: i64[2,3],
        %f: f32[6], %c: bf16[2,70,40], %k: bf16[2,70,12], %n: i64[2]) {
      %z, %u = split %x {axis=3, sizes=[12,12]} : bf16[2,3,5,12], bf16[2,3,5,12]
      %r = rope %z, %p, %f {layout="LAYOUT", scale=1.25} : bf16[2,3,5,12]
      %y = latent_attention %q, %r, %c, %k, %n {scale=0.3} : bf16[2,3,5,40]
      return %y
    }""".replace("LAYOUT", layout))
        for layout in ("half", "interleaved", "deinterleave")
    },
    "rows taken, and of a residual": (1, """(%x: bf16[2,5,70], %r: bf16[2,5,33], %w: bf16[33,70],
        %b: bf16[33], %at: i64[2,3]) {
      %a = select_rows %x, %at : bf16[2,3,70]
      %c = select_rows %r, %at : bf16[2,3,33]
      %y = fused %a, %w, %b, %c {body=graph body(%a: bf16[2,3,70], %w: bf16[33,70], %b: bf16[33],
          %c: bf16[2,3,33]) {
        %m = linear %a, %w, %b
        %s = add %c, %m
        return %s
      }} : bf16[2,3,33]
      return %y
    }"""),
    "rows taken of a part, and read otherwise": (4, """(%z: f32[2,5,90], %w: f32[33,70],
        %at: i64[2,3]) {
      %x, %u = split %z {axis=2, sizes=[70,20]} : f32[2,5,70], f32[2,5,20]
      %a = select_rows %x, %at : f32[2,3,70]
      %y = linear %a, %w : f32[2,3,33]
      %s = silu %a : f32[2,3,70]
      return %y, %s
    }"""),
    "the only row": (1, """(%x: bf16[3,1,70], %w: bf16[33,70], %only: i64[3,1]) {
      %a = select_rows %x, %only : bf16[3,1,70]
      %y = linear %a, %w : bf16[3,1,33]
      return %y
    }"""),
    "norm of many rows": (2, f"""(%x: f32[{NORMED_ROWS + 1},70], %g: f32[70], %w: f32[33,70]) {{
      %a = rms_norm %x, %g {{eps=1e-06}} : f32[{NORMED_ROWS + 1},70]
      %y = linear %a, %w : f32[{NORMED_ROWS + 1},33]
      return %y
    }}"""),
}  # fmt: skip
"""Launches, and the graph."""
SEVERAL = "of several tokens"
SPANS = {
    "merged": ("bf16", 6, """
      %y = einsum %a, %v {{eq="bshc,hdc->bshd"}} : bf16[{b},{s},3,24]
      return %y"""),
    "merged in fp32": ("f32", 3, """
      %y = einsum %a, %v {{eq="bshc,hdc->bshd"}} : f32[{b},{s},3,24]
      return %y"""),
    "read by two": ("f32", 3, """
      %y = einsum %a, %v {{eq="bshc,hdc->bshd"}} : f32[{b},{s},3,24]
      %s = silu %a : f32[{b},{s},3,40]
      return %y, %s"""),
    "of many rows": ("f32", 20, """
      %y = einsum %a, %v {{eq="bshc,hdc->bshd"}} : f32[{b},{s},3,24]
      return %y"""),
    SEVERAL: ("f32", 3, """
      %y = einsum %a, %v {{eq="bshc,hdc->bshd"}} : f32[{b},{s},3,24]
      return %y"""),
}  # fmt: skip
"""Of attention over a cache in spans: element type, the largest batch, and what reads it."""


def spans(number: int, name: str) -> tuple[str, str]:
    """A symbol with its range, and a graph."""
    kind, most, rest = SPANS[name]
    batch, tokens = f"B{number}", "S" if name == SEVERAL else "1"
    given = {"q": f"{tokens},3,40", "r": f"{tokens},3,6", "c": "400,40", "k": "400,6"}
    operands = ", ".join(f"%{x}: {kind}[{batch},{shape}]" for x, shape in given.items())
    lines = (ATTENTION + rest).format(t=kind, b=batch, s=tokens)
    head = f"graph s{number}({operands}, %n: i64[{batch}], %v: {kind}[3,24,40])"
    return f"{batch}=[1,{most}]", f"{head} {{\n{lines}\n}}\n"


def merged() -> Program:
    """All of them: a process of the interpreter runs one program."""
    graphs = [f"graph g{i}{text}\n" for i, (_, text) in enumerate(TEXTS.values())]
    made = [spans(i, name) for i, name in enumerate(SPANS)]
    symbols = ", ".join(["S=[1,5]", *(symbol for symbol, _ in made)])
    graphs += [graph for _, graph in made]
    return parse_program(
        f'program "merged" {{stage=LOWERED}}\nsymbols {{{symbols}}}\n{"".join(graphs)}'
    )


def traced(program: Program, folder: Path, target: str = TARGET) -> TracedExecutable:
    """The kernels of a target, watched in the interpreter."""
    lowered, generated = lower_program(program, target)
    (folder / "kernels").mkdir()
    for name, text in with_templates(lowered, generated).items():
        (folder / "kernels" / f"{name}.py").write_text(text)
    (folder / INTERPRETED).parent.mkdir()
    (folder / INTERPRETED).write_bytes(lowered.plan().to_json())
    return TracedExecutable(folder, folder / "none", program)


def agree(executable: TracedExecutable, graph: Graph, given: Mapping[str, torch.Tensor]) -> None:
    wanted = run_graph(graph, [x.clone() for x in given.values()])
    found = executable.run(graph.name, dict(given)).values()
    assert executable.faults == []
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        off = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert off < (2**-6 if ours.dtype is torch.bfloat16 else 2**-18), f"{graph.name}: {off}"


def operands(
    graph: Graph, batch: int = 1, seed: int = 0, tokens: int = 1
) -> dict[str, torch.Tensor]:
    generator, found = torch.Generator().manual_seed(seed), {}
    for value in graph.inputs:
        first, *rest = value.type.shape
        shape = [first if isinstance(first, int) else batch]
        shape += [d if isinstance(d, int) else tokens for d in rest]
        found[value.name] = torch.randn(shape, generator=generator).to(value.type.dtype.torch)
    if "only" in found:
        found["only"] = torch.zeros_like(found["only"])
    if "at" in found:
        found["at"] = torch.tensor([[4, 0, 4], [3, 2, 1]])
    if "p" in found:
        found["p"], found["n"] = torch.tensor([[9, 500, 77], [0, 1, 2]]), torch.tensor([60, 0])
    return found


@pytest.fixture(scope="module")
def program() -> Program:
    return merged()


@pytest.fixture(scope="module")
def plans(program: Program) -> Mapping[str, EntryPlan]:
    return lower_program(program, TARGET)[0].entries


@pytest.fixture(scope="module")
def watched(
    program: Program, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TracedExecutable]:
    executable = traced(program, tmp_path_factory.mktemp("merged"))
    yield executable
    executable.close()


@pytest.mark.parametrize("name", TEXTS)
def test_products_and_attention_make_what_they_read(
    program: Program, plans: Mapping[str, EntryPlan], watched: TracedExecutable, name: str
) -> None:
    entry = f"g{list(TEXTS).index(name)}"
    assert len(plans[entry].launches) == TEXTS[name][0]
    agree(watched, program.entries[entry], operands(program.entries[entry]))


@pytest.mark.parametrize(
    ("name", "batch", "launches", "tokens"),
    [
        ("merged", 1, 2, 1), ("merged", 4, 2, 1), ("merged", 6, 2, 1), ("merged in fp32", 3, 2, 1),
        ("read by two", 2, 4, 1),
        ("of many rows", 2, 3, 1), ("of many rows", 3, 3, 1), ("of many rows", 6, 2, 1),
        (SEVERAL, 1, 3, 1), (SEVERAL, 1, 3, 5), (SEVERAL, 3, 3, 2),
    ],
)  # fmt: skip
def test_a_product_merges_what_attention_found_in_spans_of_the_cache(
    program: Program,
    plans: Mapping[str, EntryPlan],
    watched: TracedExecutable,
    name: str,
    batch: int,
    launches: int,
    tokens: int,
) -> None:
    """Sequences of which some fill no second span; of many sequences there is one span."""
    number = list(SPANS).index(name)
    graph = program.entries[f"s{number}"]
    given = operands(graph, batch, batch, tokens)
    given["n"] = torch.tensor([400 - tokens, 0, 63, 200, 64, 7])[:batch]
    calls = resolve(plans[graph.name], {f"B{number}": batch, "S": tokens}).calls
    assert sum(0 not in call.grid for call in calls) == launches
    agree(watched, graph, given)
