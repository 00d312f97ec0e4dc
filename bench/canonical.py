"""Canonical nodes of a layer: what raising makes of the decoders that transformers knows.

    python -m bench.canonical [TYPE ...]      a line a type: nodes of each kind of layer, or why not

Each type's own default configuration is shrunk (`frontends/shrunk.py`), traced and raised; with
`--dump DIR` the programs are written there as text. A layer of at most 30 nodes can be read.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.matrix import TYPES
from dsc.errors import DscError
from dsc.ir.graph import Value
from dsc.ir.layers import layer_number
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.pipeline import RAISE, apply

MOST = 30
"""Nodes of a layer."""
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "num_experts_per_tok": 6, "n_routed_experts": 64, "topk_method": "greedy", "n_group": 1,
        "topk_group": 1, "q_lora_rank": None,
    },
    "dots1": {
        "num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    },
    "glm4_moe": {"use_qk_norm": True},
}  # fmt: skip
"""Published values where a type's own defaults make no model, or leave a part out."""


def traced(kind: str) -> Program:
    """One step of a type in its default configuration, shrunk; weights have no values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from dsc.frontends.causal_lm import CausalLMStep, trace_step
    from dsc.frontends.shrunk import shrunk
    from dsc.frontends.stock import clean, stock_model

    values = CONFIG_MAPPING[kind]().to_dict() | CHANGES.get(kind, {})
    step = CausalLMStep(stock_model(clean(shrunk(values)))).eval()
    return trace_step(step, step.signature, {}, whole=True)


def raised(program: Program) -> Program:
    """The program at stage CANONICAL. Raises `UnsupportedOperator`."""
    return apply(program, RAISE)


def nodes_by_layer(program: Program) -> dict[int, Counter[str]]:
    """Operators of each layer, by the module that they come from.

    What is computed from positions and numbers alone is no layer's: all share it.
    """
    found: dict[int, Counter[str]] = {}
    graph = program.entries["step"]
    shared = {v.name for v in graph.inputs if v.type.dtype.is_int}
    for node in graph.nodes:
        if all(isinstance(x, Value) and x.name in shared for x in node.operands):
            shared |= {v.name for v in node.outputs}
            continue
        layer = layer_number(node.loc)
        if layer is not None:
            found.setdefault(layer, Counter())[node.op] += 1
    return found


def line(kind: str, dump: Path | None) -> tuple[str, bool]:
    """What to tell of a type, and whether it is as it should be."""
    try:
        program = raised(traced(kind))
    except (DscError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as why:
        return f"{kind:15} {type(why).__name__}: {str(why).splitlines()[0]:.120}", False
    if dump is not None:
        (dump / f"{kind}.dsc").write_text(print_program(program))
    layers = nodes_by_layer(program)
    counts = sorted({sum(each.values()) for each in layers.values()})
    most = max(layers.values(), key=lambda each: sum(each.values()))
    told = " ".join(f"{n} {op}" if n > 1 else op for op, n in most.most_common())
    return f"{kind:15} {'/'.join(map(str, counts)):8} {told}", counts[-1] <= MOST


def main(given: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a type is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", default=TYPES)
    parser.add_argument("--dump", type=Path)
    asked = parser.parse_args(given)
    good = True
    for kind in asked.types:
        told, fine = line(kind, asked.dump)
        print(told, flush=True)
        good &= fine
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
