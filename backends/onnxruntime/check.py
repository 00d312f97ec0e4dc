"""`dsc export --check`: everything that can be held against an export, one finding a question.

weights             every tensor of every file is what was written, by its hash
external data       every model reads bytes of the artifact's own files, each its own, alone; what
                    does not is asked nothing more
onnx.checker        every model by its path, with full_check
shapes              onnx's own inference by path, strict: what is declared is what follows
reference           onnx's ReferenceEvaluator on a small model gives what ONNX Runtime gives
ONNX Runtime        every entry against our interpreter on the packed weights; caches tell of a
                    language model's layers apart, since a layer's rows are made from its input;
                    a server's model on a prompt
operators           how many nodes of each kind every provider runs, after ONNX Runtime's own
                    rewriting
sizes               of models, weights and a token's caches
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dsc.backends.onnxruntime.external_data import check_external
from dsc.backends.onnxruntime.graph import static
from dsc.backends.onnxruntime.session import OnnxExecutable, open_session
from dsc.errors import BackendUnavailable
from dsc.ir.analyses import few_tokens
from dsc.ir.dims import evaluate
from dsc.ir.interpreter import Interpreter
from dsc.ir.limits import CAPACITY, PAST, STEP, WANTED
from dsc.ir.ops.quant import takes_codes
from dsc.ir.program import Program
from dsc.ir.samples import sample_inputs
from dsc.rewrite.widen import FP32_ROUNDINGS, NARROW, in_fp32
from dsc.runtime import artifact
from dsc.runtime.packing import damaged
from dsc.runtime.weight_files import weight_files

SMALL = 64 << 20
"""Bytes of weights up to which onnx's ReferenceEvaluator, which is slow, runs a model."""
ROOM = 4.0
"""How many times what rounding explains a result may be off: twice, since both round, and twice as
much in the worst number of few."""
FEW = 3
"""New tokens of a step."""
PROMPT = 5
"""Tokens that a server's model is given."""
HELD = "against our interpreter"
"""What ONNX Runtime's numbers are."""
_LAYER = re.compile(r"\w+\.(\d+)\.")


@dataclass(frozen=True)
class Finding:
    """The answer to one question about one model; `passed` is None where it was not asked, why."""

    question: str
    model: str
    passed: bool | None
    told: str


@dataclass
class Checked:
    """All that was found of an export."""

    findings: list[Finding] = field(default_factory=list)
    operators: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def failure(self) -> str:
        """One sentence on the first thing that is wrong; empty where nothing is."""
        wrong = [x for x in self.findings if x.passed is False]
        return f"{wrong[0].question} of {wrong[0].model}: {wrong[0].told}" if wrong else ""

    def to_json(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return {**asdict(self), "failure": self.failure}


def check(folder: Path) -> Checked:
    """Hold everything against the artifact in `folder`. Raises `ArtifactError` where it is none."""
    return _Check(artifact.read(folder, trust=True)).run()


class _Check:
    def __init__(self, opened: artifact.Artifact) -> None:
        self.opened, self.folder = opened, opened.folder
        self.program: Program = opened.program
        self.manifest = opened.manifest
        self.found = Checked()
        names = sorted(name for name in self.manifest["files"] if name.endswith(".onnx"))
        self.models = {name: self.folder / name for name in names}

    def run(self) -> Checked:
        """Ask every question."""
        files = self.manifest["files"]
        for name, facts in weight_files(self.manifest).items():
            self._ask("weights", name, partial(_whole, self.folder / name, facts))
        for name in self.models:
            self._ask("external data", name, partial(_external, self.folder, name, files))
        if self.found.failure:
            return self.found
        for name, path in self.models.items():
            self._ask("onnx.checker", name, partial(_checker, path))
            self._ask("shapes", name, partial(_shapes, path))
            self._operators(name, path)
        weights = self.manifest["weights"]
        for name, entry in self._entries().items():
            if weights is None and self.program.weights:
                for question in ("ONNX Runtime", "reference"):
                    self._note(question, name, None, "it has no weights")
                continue
            for step in self._steps(entry):
                told = f", a step of {step} tokens" if self.program.is_causal_lm else ""
                ask = partial(self._interpreted, name, entry, step)
                self._ask("ONNX Runtime", name, ask, f"{HELD}{told}: ")
            size = self._weight_bytes()
            if size > SMALL:
                self._note("reference", name, None, f"its weights take {size:,} bytes")
            else:
                told = "onnx's evaluator against ONNX Runtime: "
                self._ask("reference", name, partial(self._referenced, name, entry), told)
        for name in self.models.keys() - self._entries().keys():
            if weights is not None and self.program.is_causal_lm:
                told = f"{HELD}, a prompt of {PROMPT} tokens: "
                self._ask("ONNX Runtime", name, partial(self._served, name), told)
        self._sizes()
        return self.found

    def _ask(
        self, question: str, model: str, ask: Callable[[], tuple[bool | None, str]], on: str = ""
    ) -> None:
        """Note the answer, behind what was asked; what raises is a no, told by its first line."""
        try:
            passed, told = ask()
        except Exception as problem:
            lines = str(problem).strip().splitlines() or [""]
            passed, told = False, f"{type(problem).__name__}: {lines[0]}"
        self._note(question, model, passed, on + told)

    def _note(self, question: str, model: str, passed: bool | None, told: str) -> None:
        self.found.findings.append(Finding(question, model, passed, told))

    def _entries(self) -> dict[str, str]:
        """For each model that runs entries, the most general of them."""
        models: Mapping[str, str] = self.manifest["meta"]["models"]
        return {path: entry for entry, path in models.items()}

    @cached_property
    def executable(self) -> OnnxExecutable:
        """The models, whose sessions are on the CPU whatever they were made for."""
        meta = {**self.manifest["meta"], "provider": "cpu"}
        return OnnxExecutable(self.folder, {**self.manifest, "meta": meta}, self.program)

    def _inputs(self, entry: str, step: int = FEW) -> dict[str, Any]:
        """Seeded inputs: of a language model a step of two sequences, not equally long."""
        graph = self.program.entries[entry]
        wanted = {"B": 2, STEP: step, PAST: 5, CAPACITY: step + 6, WANTED: 2}
        bounds = self.program.symbols
        sizes = {
            name: max(each.lo, min(each.hi, wanted.get(name, 3))) for name, each in bounds.items()
        }
        if not self.program.is_causal_lm:
            return sample_inputs(graph, sizes)
        past = sizes.get(PAST, wanted[PAST])
        return sample_inputs(graph, sizes, lengths=[past - n for n in range(sizes["B"])])

    def _interpreted(self, model: str, entry: str, step: int) -> tuple[bool, str]:
        """Whether ONNX Runtime gives what the interpreter gives, and the worst layer."""
        inputs = self._inputs(entry, step)
        wanted, limit = self._due(entry, inputs)
        given = {name: _array(x) for name, x in inputs.items()}
        found = self.executable.run(entry, given)
        off: dict[str, float] = {}
        for name, value in wanted.items():
            match = _LAYER.match(name)
            layer = f"layer {match[1]}" if match else name
            off[layer] = max(off.get(layer, 0.0), _off(_array(found[name]), value))
        before = self.found.layers.get(model, {})
        self.found.layers[model] = {k: max(x, before.get(k, 0.0)) for k, x in off.items()}
        worst = max(off, key=lambda layer: off[layer])
        told = f"off by {off[worst]:.1e} of the largest number at most, in {worst}"
        return bool(off[worst] <= limit), f"{told}; rounding explains {limit:.1e}"

    def _due(self, entry: str, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        """What the interpreter gives, and the share by which rounding explains another result.

        In fp32 that grows with the depth of the program. In 16 bits it is what those bits change;
        ONNX Runtime widens and rounds elsewhere. Where rows are codes, a number may become the next
        code for its last bit: plain weights moved so far, either way, tell what that comes to.
        """
        graph = self.program.entries[entry]
        wanted = {k: _array(x) for k, x in Interpreter(self.program).run(entry, inputs).items()}
        others = []
        if any(x.type.dtype in NARROW for node in graph.walk() for x in node.outputs):
            others.append(in_fp32(self.program))
        if any(map(takes_codes, graph.nodes)):
            others += [in_fp32(self.program, x) for x in (FP32_ROUNDINGS, -FP32_ROUNDINGS)]
        explained = FP32_ROUNDINGS * len(graph.nodes) ** 0.5
        for other in others:
            wide = {v.name: v.type.dtype.torch for v in other.entries[entry].inputs}
            given = {name: x.to(wide[name]) for name, x in inputs.items()}
            found = Interpreter(other).run(entry, given)
            explained = max(explained, *(_off(_array(found[k]), x) for k, x in wanted.items()))
        return wanted, ROOM * explained

    def _served(self, name: str) -> tuple[bool | None, str]:
        """Whether a server's model gives the last logits of a prompt, its caches empty."""
        guards = self.program.guards
        entry = next(x.entry for x in guards if x.admits(PROMPT, 1, PROMPT))
        sizes = {"B": 1, STEP: PROMPT, PAST: 0, CAPACITY: PROMPT, WANTED: 1}
        inputs = sample_inputs(self.program.entries[entry], sizes, lengths=[0])
        inputs["logits_at"].fill_(PROMPT - 1)
        session, feeds = open_session(self.models[name], None), {}
        for port in session.get_inputs():
            shape = [x if isinstance(x, int) else sizes.get(x, 0) for x in port.shape]
            if port.type == "tensor(bfloat16)":
                return None, "NumPy has no bfloat16"
            feeds[port.name] = np.zeros(shape, _numpy(port.type))
        feeds["input_ids"] = _array(inputs["input_ids"])
        if "attention_mask" in feeds:
            feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
        wanted, limit = self._due(entry, inputs)
        found = session.run(["logits"], feeds)[0][:, -1:]
        off = _off(found, wanted["logits"])
        told = f"off by {off:.1e} of the largest logit; rounding explains {limit:.1e}"
        return bool(off <= limit), told

    def _steps(self, entry: str) -> list[int]:
        """New tokens of the steps that are tried: few, and so many that attention is expanded."""
        types = self.program.weight_types()
        halves = [(types[f"{name}.k"], types[f"{name}.v"]) for name in types
                  if {f"{name}.k", f"{name}.v"} <= types.keys()]  # fmt: skip
        extents = {tuple(map(static, (k.shape[1], v.shape[1], k.shape[2]))) for k, v in halves}
        few = {few_tokens(*each) for each in extents}
        symbols = {x for value in self.program.entries[entry].inputs for x in value.type.symbols}
        most = self.program.symbols[STEP].hi if STEP in symbols else 0
        return [FEW, *sorted(n + 1 for n in few if FEW <= n < most)]

    def _referenced(self, model: str, entry: str) -> tuple[bool | None, str]:
        """Whether onnx's own evaluator gives what ONNX Runtime gives."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        proto = onnx.load(str(self.models[model]))
        strange = sorted({x.domain for x in proto.opset_import if x.domain not in ("", "ai.onnx")})
        if strange:
            return None, f"it knows no operators of {', '.join(strange)}"
        session = open_session(self.models[model], None)
        feeds = {}
        inputs = self._inputs(entry)
        for port in session.get_inputs():
            if port.type == "tensor(bfloat16)":
                return None, "NumPy has no bfloat16"
            array = _array(inputs[port.name])
            feeds[port.name] = array.astype(_numpy(port.type), copy=False)
        wanted = session.run(None, feeds)
        found = ReferenceEvaluator(proto, new_ops=_own_operators()).run(None, feeds)
        off = max(_off(x, y) for x, y in zip(found, wanted, strict=True))
        _, limit = self._due(entry, inputs)
        told = f"off by {off:.1e} of the largest number at most; rounding explains {limit:.1e}"
        return bool(off <= limit), told

    def _operators(self, name: str, path: Path) -> None:
        """Have ONNX Runtime prepare a model, and note which provider runs what of it."""
        provider = self.manifest["meta"].get("provider", "cpu")

        def opened() -> tuple[bool | None, str]:
            missing = ""
            try:
                session = open_session(path, None, provider=provider, assigned=True)
            except BackendUnavailable as absent:
                session, missing = open_session(path, None, assigned=True), f"{absent.what}; "
            counted = _assigned(session)
            self.found.operators[name] = {k: dict(v.most_common()) for k, v in counted.items()}
            told = ", ".join(f"{sum(v.values())} nodes on {k}" for k, v in counted.items())
            return None if missing else True, missing + told

        self._ask("operators", name, opened)

    def _weight_bytes(self) -> int:
        return sum(facts["bytes"] for facts in weight_files(self.manifest).values())

    def _sizes(self) -> None:
        """Note what the files take, and the caches of a token."""
        files = self.manifest["files"]
        self.found.sizes["models"] = sum(files[name]["bytes"] for name in self.models)
        self.found.sizes["weights"] = self._weight_bytes()
        rows = [s for s in self.program.states if s.storage.of_tokens]
        layers = {match[1] for s in rows if (match := _LAYER.match(s.input))}
        if rows:
            values = sum(int(np.prod([evaluate(d, {}) for d in s.type.shape])) for s in rows)
            self.found.sizes["cache_bytes_per_token"] = sum(s.nbytes for s in rows)
            self.found.sizes["cache_values_per_token_per_layer"] = values // max(1, len(layers))


def _whole(path: Path, facts: Mapping[str, Any]) -> tuple[bool, str]:
    tensor = damaged(path, facts)
    if tensor:
        return False, f"the hash of {tensor} is not that of what was written"
    return True, "what was written"


def _external(folder: Path, model: str, files: Mapping[str, Any]) -> tuple[bool, str]:
    check_external(folder, model, files)
    return True, "in files of the artifact"


def _checker(path: Path) -> tuple[bool, str]:
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    return True, "accepted"


def _shapes(path: Path) -> tuple[bool, str]:
    import onnx

    with tempfile.TemporaryDirectory() as place:
        out = str(Path(place) / "inferred.onnx")
        onnx.shape_inference.infer_shapes_path(str(path), out, True, True, True)
    return True, "what is declared follows"


def _assigned(session: Any) -> dict[str, Counter[str]]:
    """What each provider runs; nothing where ONNX Runtime is too old to tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    counted: dict[str, Counter[str]] = {}
    for part in tell() if tell is not None else ():
        spelled = (f"{n.domain}.{n.op_type}".lstrip(".") for n in part.get_nodes())
        counted.setdefault(part.ep_name, Counter()).update(spelled)
    return counted


def _own_operators() -> list[Any]:
    """Operators that onnx's evaluator gets wrong: its GatherElements takes no negative axis."""
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):
        def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
            return (np.take_along_axis(data, indices, axis),)

    return [GatherElements]


def _array(x: Any) -> Any:
    """A tensor as an array; one of bf16 as fp32, which NumPy has."""
    if isinstance(x, np.ndarray):
        return x.astype(np.float32) if x.dtype.kind == "V" or "bfloat16" in str(x.dtype) else x
    return x.float().numpy() if "bfloat16" in str(x.dtype) else x.numpy()


def _numpy(kind: str) -> Any:
    """The NumPy type of ONNX Runtime's name for one."""
    short = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(short, short))


def _off(found: Any, wanted: Any) -> float:
    """The largest difference, as a share of the largest number."""
    if not wanted.size:
        return 0.0
    a, b = (np.nan_to_num(x.astype(np.float64), posinf=1e38, neginf=-1e38) for x in (found, wanted))
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
