"""A step of a causal LM under the inputs and outputs that exports of transformers have.

    input_ids i64[B,S], attention_mask i64[B,P+S], past_key_values.N.key, past_key_values.N.value
        ->  logits, present.N.key, present.N.value

ONNX Runtime GenAI and optimum call a decoder so. The mask says which columns of P+S hold a token;
those of a step are one run in each sequence, wherever its padding is. From it come what our own
step takes: the run moves to the front, `lengths` and `logits_at` are counts. So rows of caches lie
at the places that they have without padding, and callers never look at rows.

How caches are cut into keys and values is what the caller can hold:

    heads   [B, G, P, d]   keys and values as transformers has them: optimum makes empty ones of
                           its own from config.json
    rows    [B, 1, P, w]   a whole row as one head, which moves nothing

Latent caches are no keys and values. As rows, the latents and the rotated key of a token are one
row of 576 numbers, and the key is its first half, the value its second: GenAI takes one width for
both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsc.backends.onnxruntime.graph import ONNX_TYPE, GraphWriter, static
from dsc.backends.onnxruntime.interface import Interface
from dsc.backends.onnxruntime.ports import Port
from dsc.errors import UsageError
from dsc.ir.dims import Dim, symbol
from dsc.ir.graph import Graph
from dsc.ir.program import Program
from dsc.ir.types import DType

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
PARTS = ("key", "value")
MASK = (
    "1 where a column of P+S holds a token, 0 at padding. The ones of a step's last S columns are"
    " one run in each sequence."
)
_STATE = re.compile(r"past\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Layer:
    """The two caches of a layer: their names, and how wide their rows are."""

    number: int
    states: tuple[str, str]
    widths: tuple[int, int]
    dtype: DType

    @property
    def equal(self) -> bool:
        """Whether they are keys and values of one width."""
        return self.widths[0] == self.widths[1]


@dataclass(frozen=True)
class StockSignature:
    """The signature for one program; `kv_heads` cuts rows into heads, 1 leaves them whole.

    `all_logits`: of all S tokens, as transformers gives them, else of the last one alone.
    """

    layers: tuple[Layer, ...]
    logits: Port
    kv_heads: int = 1
    all_logits: bool = False

    @staticmethod
    def of(
        program: Program, graph: Graph, border: Interface, heads: bool, all_logits: bool
    ) -> StockSignature:
        """The signature of `graph`. Raises `UsageError` where its states are no such pairs."""
        layers = _layers(graph, border)
        kv_heads = 1
        if heads:
            kv_heads = int(program.meta.get("config", {}).get("num_key_value_heads") or 0)
            odd = [w for each in layers for w in each.widths if not kv_heads or w % kv_heads]
            if odd or not all(each.equal for each in layers):
                raise UsageError(
                    "this model's caches are no keys and values in heads",
                    hint="export it without --for, or --for genai, which takes whole rows",
                )
        if not heads and any(not each.equal and sum(each.widths) % 2 for each in layers):
            raise UsageError(
                "a cached token of this model is an odd number of values, which key and value"
                " cannot share",
                hint="export it without --for",
            )
        at = graph.output_names.index("logits")
        wanted: Dim = symbol("S") if all_logits else 1
        shape = (symbol("B"), wanted, graph.outputs[at].type.shape[-1])
        logits = Port("logits", border.outputs["logits"], shape, _LOGITS)
        return StockSignature(layers, logits, kv_heads, all_logits)

    def shape(self, layer: Layer, rows: Dim) -> tuple[Dim, ...]:
        """Of a layer's key, and of its value."""
        width = sum(layer.widths) // 2 // self.kv_heads
        return (symbol("B"), self.kv_heads, rows, width)

    @property
    def inputs(self) -> list[Port]:
        """What the model takes."""
        batch, new, past = (symbol(s) for s in ("B", "S", "P"))
        caches = [
            Port(PAST.format(x.number, part), x.dtype, self.shape(x, past), _CACHE)
            for x in self.layers
            for part in PARTS
        ]
        ids = Port("input_ids", DType.i64, (batch, new), "The S new tokens of each sequence.")
        return [ids, Port("attention_mask", DType.i64, (batch, past + new), MASK), *caches]

    @property
    def outputs(self) -> list[Port]:
        """What it gives."""
        rows = symbol("P") + symbol("S")
        caches = [
            Port(PRESENT.format(x.number, part), x.dtype, self.shape(x, rows), _CACHE)
            for x in self.layers
            for part in PARTS
        ]
        return [self.logits, *caches]

    def enter(self, g: GraphWriter) -> dict[str, str]:
        """Append what makes our step's inputs; their values by name."""
        first = PAST.format(self.layers[0].number, "key")
        g.pool.symbols.update({"B": ("input_ids", 0), "S": ("input_ids", 1), "P": (first, 2)})
        new, past = g.dim(symbol("S")), g.dim(symbol("P"))
        last = g.op("Sub", new, g.i64(1))
        mask, end = "attention_mask", g.i64(np.iinfo(np.int64).max)
        before = g.op("Slice", mask, g.i64(0), past, g.i64(1))
        own = g.op("Slice", mask, past, end, g.i64(1))
        lengths = g.op("ReduceSum", before, g.i64(1), keepdims=0)
        count = g.op("ReduceSum", own, g.i64(1), keepdims=1)
        front = g.op("ArgMax", g.op("Cast", own, to=ONNX_TYPE[DType.i32]), axis=1, keepdims=1)
        steps = g.op("Unsqueeze", g.arange(symbol("S")), g.i64(0))
        moved = g.op("Min", g.op("Add", steps, front), last)
        if self.all_logits:
            wanted = g.op("Max", g.op("Sub", steps, front), g.i64(0))
        else:
            wanted = g.op("Max", g.op("Sub", count, g.i64(1)), g.i64(0))
        values = {
            "input_ids": g.op("GatherElements", "input_ids", moved, axis=1),
            "positions": g.op("Add", g.op("Unsqueeze", lengths, g.i64(1)), steps),
            "lengths": lengths,
            "logits_at": wanted,
        }
        g.pool.symbols["L"] = (wanted, 1)
        for layer in self.layers:
            pair = [PAST.format(layer.number, part) for part in PARTS]
            values |= zip(layer.states, self._rows(g, layer, pair), strict=True)
        return values

    def leave(self, g: GraphWriter, results: Mapping[str, str]) -> list[str]:
        """Append what makes of our step's results those of the model."""
        made = [results["logits"]]
        for layer in self.layers:
            rows = [results[name.replace("past", "present", 1)] for name in layer.states]
            made += self._parts(g, layer, rows)
        return made

    def _rows(self, g: GraphWriter, layer: Layer, pair: Sequence[str]) -> Sequence[str]:
        """Caches as [B, P, w] from keys and values."""
        if self.kv_heads > 1:
            pair = [g.transpose(x, 0, 2, 1, 3) for x in pair]
            return [
                g.op("Reshape", x, g.i64(0, 0, width))
                for x, width in zip(pair, layer.widths, strict=True)
            ]
        pair = [g.op("Squeeze", x, g.i64(1)) for x in pair]
        if layer.equal:
            return pair
        return g.ops("Split", 2, g.op("Concat", *pair, axis=2), g.i64(*layer.widths), axis=2)

    def _parts(self, g: GraphWriter, layer: Layer, rows: Sequence[str]) -> Sequence[str]:
        """Keys and values from caches [B, P+S, w]."""
        if self.kv_heads > 1:
            heads = g.i64(0, 0, self.kv_heads, sum(layer.widths) // 2 // self.kv_heads)
            return [g.transpose(g.op("Reshape", x, heads), 0, 2, 1, 3) for x in rows]
        if not layer.equal:
            half = sum(layer.widths) // 2
            rows = g.ops("Split", 2, g.op("Concat", *rows, axis=2), g.i64(half, half), axis=2)
        return [g.op("Unsqueeze", x, g.i64(1)) for x in rows]


_LOGITS = "The scores of the vocabulary after each token wanted, padding left out of account."
_CACHE = "Opaque to callers: the next step takes what this one gives."


def _layers(graph: Graph, border: Interface) -> tuple[Layer, ...]:
    """The caches of each layer in order. Raises `UsageError` where they are not two a layer."""
    held: dict[int, list[Any]] = {}
    for _, source in graph.aliases:
        value = graph.inputs[source]
        found = _STATE.match(value.name)
        if found is None or value.type.rank != 3:
            raise UsageError(
                f"{value.name} : {value.type} is no cache of rows",
                hint="export it without --for",
            )
        held.setdefault(int(found[1]), []).append(value)
    odd = [number for number, values in held.items() if len(values) != 2]
    if odd or not held:
        told = f"layer {odd[0]} has {len(held[odd[0]])}" if odd else "it has none"
        raise UsageError(f"two caches a layer are wanted, and {told}", hint="leave out --for")
    return tuple(
        Layer(
            number,
            (values[0].name, values[1].name),
            (static(values[0].type.shape[2]), static(values[1].type.shape[2])),
            border.inputs[values[0].name],
        )
        for number, values in sorted(held.items())
    )
