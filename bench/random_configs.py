"""Random legal configurations of the family whose widths coincide, against stock transformers.

A pass tells axes apart by their extents, so what breaks it is a configuration in which two extents
that mean different things are equal: heads x rope = nope, kv_lora = heads x v, one head, hidden =
vocabulary. `draw` seeks those on purpose: configuration `i` has the `i`-th of all equations
"width = width" and "width = width x width", drawn around with small widths that coincide anyhow.

Each is compiled for every backend and compared with the stock class in fp32, over a prompt, a batch
of different lengths in chunks and decode steps, within the bound of `bench.parity`. Tracing takes
longer than all of that, so a few `structures` are traced once, at widths that are all unlike, and
their traces written down at those of a configuration (`bench.apart`). Every tenth is traced itself,
and compiled with LLVM's optimisations; where there is a trace of its structure too, the two must be
the same. Every twentieth has the structure that was drawn, whether that is traced or not.

    python -m bench.random_configs [FIRST LAST]    # results go to bench/out/random_configs.jsonl

What was measured at this commit is not measured again, so ranges may run side by side.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import dsc
from bench import parity
from bench.apart import Structure, apart, at, covering, traced, valued
from bench.results import OUT, earlier, failed, keep, tell
from dsc.errors import ConfigError
from dsc.frontends.family import ModelConfig, parse_config
from dsc.frontends.huggingface import stock_causal_lm
from dsc.ir.analyses import structural_hash
from dsc.ir.graph import Node, Operand, Weight
from dsc.ir.printer import print_program
from dsc.ir.program import Program

RESULTS = OUT / "random_configs.jsonl"
BACKENDS = ("reference", "tvm", "onnxruntime")
SMALL = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)
CONTEXT, CHUNK, BATCH = 24, 8, 4
LIMITS: dict[str, Any] = {"max_batch": BATCH, "max_context": CONTEXT, "prefill_chunk": CHUNK}
LIVE = 10
"""Of so many configurations one is traced itself, and its code optimised by LLVM."""
WIDTHS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_attention_heads",
    "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
)  # fmt: skip
IMPOSSIBLE = ("num_experts_per_tok", ("qk_rope_head_dim", "n_routed_experts"))
EVEN = ("kv_lora_rank", "qk_nope_head_dim")
"""What the stock V2 class wants even in fp32."""
MOST = 96
"""No width exceeds this, so that a configuration costs seconds."""


Equation = tuple[str, tuple[str, ...]]


def equations() -> list[Equation]:
    """All coincidences sought: a width, and the one or two whose product it equals.

    One cannot be: rope turns pairs, so its product with the experts exceeds the experts.
    """
    pairs = [(x, (y,)) for x in WIDTHS for y in WIDTHS if x < y]
    products = [
        (x, pair) for x in WIDTHS for pair in combinations_with_replacement(WIDTHS, 2)
        if x not in pair
    ]  # fmt: skip
    found: list[Equation] = [each for each in pairs + products if each != IMPOSSIBLE]
    random.Random(0).shuffle(found)
    return found


EQUATIONS = equations()


def draw(index: int) -> ModelConfig:
    """Configuration `index`: legal, small, and the same at every call."""
    wanted = EQUATIONS[index]
    chance = random.Random(str(wanted))
    for attempt in range(10_000):
        fields = _fields(chance, attempt)
        if not _impose(fields, *wanted):
            continue
        try:
            config = parse_config(fields)
        except ConfigError:
            continue
        if turns(config):
            return config
    raise RuntimeError(f"no legal configuration has {wanted}")


def turns(config: ModelConfig) -> bool:
    """Whether the stock class runs in fp32, where a V2 views halves of rows as complex numbers."""
    odd = any(getattr(config, name) % 2 for name in EVEN)
    return config.model_type != "deepseek_v2" or not odd


def _fields(chance: random.Random, attempt: int) -> dict[str, Any]:
    """One draw, legal or not. The first try of a V3 router is often right, of others seldom."""
    v3 = chance.random() < 0.6
    layers = 1 if chance.random() < 0.8 else 2
    groups = chance.choice((1, 1, 2, 3, 4))
    experts = groups * chance.choice((1, 2, 2, 3, 4))
    kept = chance.randint(1, groups)
    fields: dict[str, Any] = {name: chance.choice(SMALL) for name in WIDTHS}
    fields |= {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "num_hidden_layers": layers,
        "first_k_dense_replace": chance.choice((0, 0, 0, 1, layers)),
        "num_attention_heads": chance.choice((1, 2, 2, 3, 4, 6)),
        "qk_rope_head_dim": chance.choice((2, 4, 6, 8, 16)),
        "n_routed_experts": experts,
        "num_experts_per_tok": chance.choice((1, 2, experts, kept * (experts // groups))),
        "n_shared_experts": chance.choice((1, 1, 2, 3)),
        "n_group": groups,
        "topk_group": kept,
        "routed_scaling_factor": chance.choice((1.0, 2.5)),
        "max_position_embeddings": 4 * CONTEXT,
        "rms_norm_eps": 1e-6,
        "attention_bias": chance.random() < 0.2,
        "tie_word_embeddings": chance.random() < 0.2,
        "rope_parameters": chance.choice((parity.PLAIN, _YARN)),
    }
    if v3:
        fields |= {"rope_interleave": chance.random() < 0.7, "norm_topk_prob": attempt % 2 == 0}
    else:
        fields["topk_method"] = chance.choice(("greedy", "group_limited_greedy"))
        fields |= {name: fields[name] + fields[name] % 2 for name in EVEN}
    if chance.random() < 0.3:
        fields["q_lora_rank"] = None
    return fields


_YARN = parity.YARN | {"original_max_position_embeddings": CHUNK}


def _impose(fields: dict[str, Any], width: str, factors: tuple[str, ...]) -> bool:
    """Make the equation hold; whether that is possible within `MOST`."""
    if "q_lora_rank" in (width, *factors) and fields["q_lora_rank"] is None:
        return False
    product = 1
    for name in factors:
        product *= fields[name]
    fields[width] = product
    return product <= MOST


@cache
def structures() -> list[Structure]:
    """Those that are traced once: two features that meet in a draw meet in one of them."""
    drawn = [Structure.of(draw(index)) for index in range(len(EQUATIONS))]
    v3 = Structure("deepseek_v3", (True,), *_USUAL, True, "noaux_tc", scaled=True)
    both = replace(v3, experts=(False, True), yarn=False, scaled=False)
    v2 = Structure("deepseek_v2", (True,), *_USUAL, False, "group_limited_greedy", scaled=True)
    return covering(drawn, (v3, both, v2))


_USUAL = (True, False, False, True, True)
"""A query through its own latent space, no bias, an output layer of its own, YaRN, pairs."""


def configuration(index: int) -> ModelConfig:
    """Draw `index`: every twentieth as it is, others in the likest of `structures`.

    In the likest all widths of the equation mean something, which is not so in every draw.
    """
    drawn = draw(index)
    if index % (2 * LIVE) == 0:
        return drawn
    width, factors = EQUATIONS[index]
    own = Structure.of(drawn)
    given = drawn.model_dump(exclude_none=True) | {"rope_parameters": _YARN}
    given["routed_scaling_factor"] = 2.5
    fitting = [
        each for each in structures()
        if each.model_type == own.model_type and all(map(each.has, (width, *factors)))
    ]  # fmt: skip
    for structure in sorted(fitting, key=own.likeness, reverse=True):
        with suppress(ConfigError):
            config = structure.impose(given)
            if turns(config):
                return config
    return drawn


@cache
def trace_of(structure: Structure) -> tuple[str, dict[str, Any]]:
    """The trace of a structure where every extent differs, as a text, and what goes with it."""
    program = traced(apart(structure), **LIMITS)
    return print_program(replace(program, meta={})), dict(program.meta)


def program_of(config: ModelConfig, live: bool) -> Program:
    """The trace of `config`, without values: of the stock class, or that of its structure.

    Raises:
        AssertionError: there are both, and they are not the same.
    """
    structure = Structure.of(config)
    found = traced(config, **LIMITS) if live or structure not in structures() else None
    if structure not in structures():
        assert found is not None
        return found
    text, meta = trace_of(structure)
    written = at(text, apart(structure), config)
    if found is None:
        fields = config.model_dump(mode="json", exclude_none=True)
        return replace(written, meta=meta | {"config": fields})
    assert _told(found) == _told(written), "at its widths the trace is not that of the class"
    return found


def _told(program: Program) -> list[str]:
    """What a trace computes, on which weights; the scale of attention to twelve digits.

    At a width of one torch leaves out an `expand` that changes nothing.
    """
    ((_, graph),) = program.entries.items()
    same: dict[str, Operand] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(x if x is None else same.get(str(x), x) for x in node.inputs)
        if node.op == "expand" and inputs[0] is not None and inputs[0].type == node.outputs[0].type:
            same[str(node.outputs[0])] = inputs[0]
            continue
        scale = {"scale": round(node.attrs["scale"], 12)} if "scale" in node.attrs else {}
        nodes.append(replace(node, inputs=inputs, attrs=node.attrs.updated(**scale)))
    read = [str(x) for node in nodes for x in node.operands if isinstance(x, Weight)]
    return [structural_hash(replace(graph, nodes=tuple(nodes))), *read]


def check(index: int, backends: Iterable[str] = BACKENDS) -> Iterator[parity.Result]:
    """Compare configuration `index` on each backend with the stock class."""
    config = configuration(index)
    stock: Any = parity.randomise(stock_causal_lm(config, device="cpu"), index)
    live = index % LIVE == 0
    program = valued(program_of(config, live), stock)
    # Traced above with grouped GEMMs; run, those refuse most of these widths.
    stock.config._experts_implementation = "eager"
    oracle = parity.Oracle(stock)
    for backend in backends:
        with nullcontext() if live else unoptimised():
            compiled = dsc.compile(program, backend=backend, **LIMITS)
        yield compare(compiled, oracle, parity.Result(str(index), backend), config, index)


@contextmanager
def unoptimised() -> Iterator[None]:
    """LLVM without its optimisations: two thirds of what tvm's compile takes here."""
    from tvm.target import Target

    from dsc.backends.tvm import build

    made = build.tvm_target

    def target(*machine: Any) -> Any:
        return Target({**made(*machine).export(), "opt-level": 0})

    with patch.object(build, "tvm_target", target):
        yield


def compare(
    compiled: dsc.CompiledModel,
    oracle: parity.Oracle,
    result: parity.Result,
    config: ModelConfig,
    seed: int,
) -> parity.Result:
    """Fill `result`: a prompt, a batch of different lengths in chunks, decode past YaRN's length.

    A batch has as many sequences as the model has heads, where that is possible.
    """
    chance = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(config.vocab_size, shape, generator=chance)

    ids = tokens(1, CHUNK - 1)
    ours = compiled.session().prefill(ids, all_logits=True)
    parity.note(result, "prefill", oracle, ids, ours, 0)
    batch = min(config.num_attention_heads, BATCH)
    lengths = [13, 5, 1, 8][:batch]
    steps = 4
    ids = tokens(batch, lengths[0] + steps)
    prompt = torch.zeros(batch, lengths[0], dtype=torch.int64)
    for row, n in enumerate(lengths):
        prompt[row, :n] = ids[row, :n]
    session = compiled.session()
    rows = [session.prefill(prompt, lengths=lengths)]
    for step in range(steps):
        token = torch.stack([ids[row, n + step] for row, n in enumerate(lengths)])
        rows.append(session.decode(token))
    logits = torch.stack(rows, 1)
    for row, n in enumerate(lengths):
        used, mine = ids[row : row + 1, : n + steps], logits[row : row + 1]
        parity.note(result, "different lengths and decode", oracle, used, mine, n - 1)
    return result


def run(first: int, last: int) -> list[dict[str, Any]]:
    """Results of configurations `first` up to `last`, one a configuration and backend."""
    known = earlier(RESULTS)
    for index in range(first, last):
        done = {found["backend"] for found in known if found["case"] == str(index)}
        if done.issuperset(BACKENDS):
            continue
        for found in _measured(index):
            known.append(found)
            keep(RESULTS, found)
    return [found for found in known if first <= int(found["case"]) < last]


def _measured(index: int) -> Iterator[dict[str, Any]]:
    """A configuration's results; where something failed, what did, for the backends left."""
    left = list(BACKENDS)
    try:
        for result in check(index):
            left.remove(result.backend)
            ok = result.worst <= parity.TOLERANCE
            yield result.as_dict() | {"ok": ok, "worst": result.worst}
    except Exception as problem:
        for backend in left:
            yield {"case": str(index), "backend": backend, "ok": False, "error": failed(problem)}


def bar() -> dict[str, Any]:
    """1,091 legal V2 and V3 configurations whose widths coincide, on every backend.

    Two to three seconds each, every tenth ten: run `python -m bench.random_configs FIRST LAST` in
    several processes first to share it out.
    """
    found = run(0, len(EQUATIONS))
    worst = {
        b: max((r["worst"] for r in found if r["backend"] == b and "worst" in r), default=None)
        for b in BACKENDS
    }
    bad = [r for r in found if not r["ok"]]
    positions, excluded = (sum(r.get(n, 0) for r in found) for n in ("positions", "excluded"))
    return {
        "ok": not bad and excluded <= 0.01 * positions,
        "configurations": len(EQUATIONS),
        "worst": worst,
        "bad": len(bad),
        "first bad": bad[:5],
        "positions": positions,
        "excluded": excluded,
    }


def main() -> None:
    """Measure a range of configurations and print what does not hold."""
    first, last = (int(each) for each in (sys.argv[1:] or ("0", str(len(EQUATIONS)))))
    tell(run(first, last))


if __name__ == "__main__":
    main()
