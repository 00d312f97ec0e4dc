"""What a model takes and gives at its border: element types, and what every input and output is.

NumPy has no bfloat16, and ONNX Runtime's Python cannot make an array of one. So what a model with
caches gives beside them is fp32, and its caches are too where it computes in bf16: every bf16 is
an fp32. ONNX Runtime computes in fp32 on CPUs whatever the type, so the wide caches cost memory
and no conversion. What comes in is taken as it is; what goes out holds 16-bit values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsc.backends.onnxruntime.graph import NARROW
from dsc.backends.onnxruntime.options import Form
from dsc.ir.graph import Graph
from dsc.ir.program import Program
from dsc.ir.types import DType

INPUTS = {
    "input_ids": "The S new tokens of each of B sequences. A shorter sequence is padded on the"
    " right with any id.",
    "positions": "Where each new token stands in its text, counted from 0: lengths[b] + i.",
    "lengths": "How many tokens each sequence has in past.* already, 0 at first. New token i of"
    " sequence b becomes row lengths[b] + i of present.*, and sees the rows up to its own.",
    "logits_at": "Of which new tokens logits are wanted: L indices from 0 to S-1 a sequence. With"
    " padding, give new_tokens[b] - 1 for the last one.",
}
PAST = (
    "{what} of layer {layer}: row t holds token t. P is exactly the largest of lengths; a"
    " sequence's rows from lengths[b] on are padding, which nothing reads."
)
ROOM = (
    "{what} of layer {layer}: row t holds token t. C is any number of rows from the largest of"
    " lengths + S on, each of numbers: what no token was written to is not seen."
)
WRITTEN = (
    "past.{rest} with the new tokens' rows in it. Bind it to the memory of past.{rest}, and nothing"
    " else is written; it is the next past.{rest}."
)
PRESENT = (
    "past.{rest} with the new tokens' rows. Cut to the largest of the new lengths it is the next"
    " past.{rest}."
)
LOGITS = "The scores of all tokens of the vocabulary after the tokens that logits_at names."


@dataclass(frozen=True)
class Interface:
    """The element types at the border of an entry's model, by name; `caches` are the outputs'."""

    inputs: Mapping[str, DType]
    outputs: Mapping[str, DType]
    caches: frozenset[str]

    @staticmethod
    def of(graph: Graph, form: Form) -> Interface:
        """The border of a graph: its own types, but for caches and what comes beside them."""
        taken = {graph.inputs[source].name for _, source in graph.aliases}
        given = frozenset(graph.output_names[output] for output, _ in graph.aliases)

        def dtype(own: DType, cache: bool) -> DType:
            wide = own in NARROW and bool(given) and (form.wide_caches or not cache)
            return DType.f32 if wide else own

        inputs = {
            v.name: dtype(v.type.dtype, True) if v.name in taken else v.type.dtype
            for v in graph.inputs
        }
        outputs = {
            name: dtype(x.type.dtype, name in given)
            for name, x in zip(graph.output_names, graph.outputs, strict=True)
        }
        return Interface(inputs, outputs, given)


def written(graph: Graph) -> Mapping[str, str]:
    """Outputs that are caches with room for new rows, and the inputs whose memory they may have."""
    pairs = [(graph.outputs[o], graph.output_names[o], graph.inputs[i]) for o, i in graph.aliases]
    return {
        name: value.name
        for output, name, value in pairs
        if output.type == value.type
        and value.type.rank > 1
        and not isinstance(value.type.shape[1], int)
    }


def in_place(program: Program) -> bool:
    """Whether steps write new rows into caches with room for them."""
    return any(map(written, program.entries.values()))


def meaning(name: str, written: bool = False) -> str:
    """What an input or output of a causal language model is; empty for other names.

    Caches are `written` in place, or grown.

    >>> meaning("past.N.latent")[:18], meaning("x")
    ('Latents of layer N', '')
    """
    kind, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if kind == "past":
        what = {"latent": "Latents", "rope": "Rotated keys"}
        return (ROOM if written else PAST).format(what=what.get(part, part), layer=layer)
    if kind == "present":
        return (WRITTEN if written else PRESENT).format(rest=rest)
    return LOGITS if name == "logits" else INPUTS.get(name, "")
