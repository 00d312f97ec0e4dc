"""The README.md of an ONNX artifact: files, limits, every input and output, and how to call them.

It is made from the program, like the models themselves, and shows example.py as it stands.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsc._version import __version__
from dsc.backends.onnxruntime.contrib import ORT, STANDARD
from dsc.backends.onnxruntime.example import example, largest_steps
from dsc.backends.onnxruntime.interface import Interface, in_place, meaning
from dsc.backends.onnxruntime.model import result_names
from dsc.backends.onnxruntime.options import Form
from dsc.ir.graph import Graph
from dsc.ir.program import ANY_SIZE, Program
from dsc.ir.types import DType

TEXT = """# {name} as ONNX

{what}

{models}

{limits}

{ports}{example}"""
PORTS = """{level} Inputs

{head}
{inputs}

{level} Outputs

{head}
{outputs}
"""
EXAMPLE = """
## An example

{told}

```python
{code}```
"""
STEP = (
    "A step of a causal language model: new tokens and caches go in, logits and grown caches come"
    " out."
)
CALL = "A function of tensors: nothing is kept between calls."
LIMITS = (
    "Limits: B up to {max_batch} sequences, S up to {prefill_chunk} new tokens in a step, lengths"
    " + S up to {max_context} tokens in a sequence. Longer prompts go in several steps, each with"
    " the caches of the one before. {stops}"
)
RUNS_ON = {
    "cpu": "on CPUs",
    "cuda": "with its CUDA provider (`pip install onnxruntime-gpu`), and the CPU's for what that"
    " lacks",
}
SERVED = {
    "genai": "the steps of ONNX Runtime GenAI, by `genai_config.json`",
    "optimum": "the steps of optimum's `ORTModelForCausalLM.from_pretrained`",
    "triton-server": "the sequences of `tritonserver --model-repository`, by `config.pbtxt`",
}
"""What the models of servers are for."""
OPERATORS = {ORT: "operators of ONNX Runtime, and standard ones", STANDARD: "standard operators"}
CODES = {DType.i8: "int8", DType.i4: "int4"}
LAYER = re.compile(r"^(past|present)\.(\d+)\.(.*)$")
WIDTH = 100
"""Of a line of text."""


@dataclass(frozen=True)
class Export:
    """What an artifact holds: the program, a model's path by entry, and what they are made for.

    `runtime` is the first ONNX Runtime that runs them, `served` are the paths of a server's own
    models, `runner`: there is a run.py too.
    """

    program: Program
    models: Mapping[str, str]
    form: Form
    runtime: str
    server: str | None = None
    served: Collection[str] = ()
    runner: bool = False


def card(export: Export, weights: str) -> str:
    """The text; the weights are in `weights`, of which there may be none."""
    program = export.program
    causal = program.is_causal_lm
    code = example(program, export.models, export.form)
    told = "Greedy, one sequence: `example.py`." if causal else "One call: `example.py`."
    more = " `run.py` does the same and checks more." if export.runner else ""
    return TEXT.format(
        name=program.name,
        what=textwrap.fill(" ".join(_made(export, weights)), WIDTH, break_on_hyphens=False),
        models="\n".join(["| model | takes |", "|---|---|", *_models(export)]),
        limits=textwrap.fill(_limits(program), WIDTH),
        ports="\n".join(_ports(export)),
        example=EXAMPLE.format(told=told + more, code=code) if code else "",
    )


def facts(program: Program) -> dict[str, str]:
    """What a model's metadata says of it, as text."""
    known = {**asdict(program.limits), "name": program.name}
    known |= program.meta.get("generation", {})
    return {key: x if isinstance(x, str) else json.dumps(x) for key, x in known.items()}


def _made(export: Export, weights: str) -> Iterator[str]:
    """What the models are, what they are made of, and what they need."""
    program, form = export.program, export.form
    yield STEP if program.is_causal_lm else CALL
    yield f"Written by dsc {__version__}, in {OPERATORS[form.ops]} of opset {form.opset}."
    yield f"It needs ONNX Runtime {export.runtime} or later {RUNS_ON[form.provider]}."
    kinds = Counter(
        x.type.dtype
        for graph in program.entries.values() for node in graph.walk() for x in node.outputs
        if x.type.dtype.is_float
    )  # fmt: skip
    if kinds:
        yield f"Its numbers are {max(kinds, key=lambda kind: kinds[kind]).numpy}."
    if not program.weights:
        return
    formats = Counter((t.dtype, t.format) for t in program.weight_types().values())
    coded = [
        f"{count} are {CODES[dtype]} codes with a scale for {format.block[1]} columns"
        for (dtype, format), count in formats.items()
        if format is not None
    ]
    if coded:
        yield f"Of {formats.total()} weights {', '.join(coded)}."
    yield f"The weights are in `{weights}`, to which the models refer: keep them together."


def _models(export: Export) -> Iterator[str]:
    """A line for each model: what it was made for."""
    program = export.program
    if not program.is_causal_lm:
        for entry, path in export.models.items():
            yield f"| `{path}` | the inputs of {entry} |"
        return
    for path, most in largest_steps(program, export.models).items():
        whole = most >= program.limits.prefill_chunk
        yield f"| `{path}` | {'any S' if whole else f'S up to {most}: less work for few tokens'} |"
    for path in export.served:
        yield f"| `{path}` | {SERVED[str(export.server)]} |"


def _limits(program: Program) -> str:
    """How large inputs may be, and of a language model where a text ends."""
    if program.is_causal_lm:
        ids = program.meta.get("generation", {}).get("eos_token_id") or []
        one = "id" if len(ids) == 1 else "one of the ids"
        stops = f"A text ends at {one} {', '.join(map(str, ids))}." if ids else ""
        return LIMITS.format(**asdict(program.limits), stops=stops)
    sizes = [
        f"{name} from {r.lo}" + (f" to {r.hi}" if r.hi < ANY_SIZE else "")
        for name, r in program.symbols.items()
    ]
    return f"Sizes: {', '.join(sizes)}." if sizes else "All sizes are as below."


def _ports(export: Export) -> Iterator[str]:
    """Inputs and outputs: of a language model those of every model, else of each model."""
    program = export.program
    if program.is_causal_lm:
        yield _tables(list(program.entries.values())[-1], export, "##")
        return
    general = {path: entry for entry, path in export.models.items()}
    for path, entry in general.items():
        several = len(general) > 1
        title = f"## `{path}`\n\n" if several else ""
        yield title + _tables(program.entries[entry], export, "###" if several else "##")


def _tables(graph: Graph, export: Export, level: str) -> str:
    border, program = Interface.of(graph, export.form), export.program
    inputs = ((v.name, border.inputs[v.name], v.type.shape) for v in graph.inputs)
    named = zip(result_names(graph), graph.output_names, graph.outputs, strict=True)
    outputs = ((theirs, border.outputs[name], x.type.shape) for theirs, name, x in named)
    written, causal = in_place(program), program.is_causal_lm
    columns = ["name", "type", "shape", *["what it is"] * causal]
    return PORTS.format(
        level=level,
        head=f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}",
        inputs="\n".join(_rows(inputs, causal, written)),
        outputs="\n".join(_rows(outputs, causal, written)),
    )


def _rows(ports: Iterable[tuple[str, DType, Any]], causal: bool, written: bool) -> Iterator[str]:
    """A line for each input or output; those that every layer of a language model has share one."""
    lines: dict[str, list[int]] = {}
    for name, dtype, shape in ports:
        found = LAYER.match(name) if causal else None
        shown = name if found is None else f"{found[1]}.N.{found[3]}"
        told = f" {meaning(shown, written)} |" if causal else ""
        line = f"| `{shown}`{{}} | {dtype.numpy} | [{', '.join(map(str, shape))}] |{told}"
        lines.setdefault(line, []).append(-1 if found is None else int(found[2]))
    for line, layers in lines.items():
        spread = "" if layers == [-1] else f", N = {layers[0]} to {layers[-1]}"
        yield line.replace("{}", spread)
