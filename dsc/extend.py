"""Operators and rules from outside of this tree, by the same declarations as dsc's own.

    import dsc
    from dsc.extend import Formula, Role, Traits

    shrink = dsc.register_op(
        "softshrink(x: T[*n]; lambd: float) -> T[*n]",
        Traits(Role.POINTWISE),
        reference=lambda x, lambd: torch.nn.functional.softshrink(x, lambd),
        doc="x moved towards zero by lambd, and zero within.",
        example="f32[2,3] {lambd=0.5}",
        kernels={"tvm": Formula(...), "triton": "..."},
    )

The operator is then printed, parsed, verified, fused, planned, costed and run like any other, and
`shrink(x, lambd=0.5)` is it on tensors. A package that names its module under the entry-point group
`dsc.extensions` is imported when an operator is asked for that nobody has declared, and before
rules are applied; another is imported by who uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from dsc.errors import ParseError, UsageError
from dsc.ir import op as declarations
from dsc.ir.calls import Call
from dsc.ir.graph import Graph, GraphBuilder, Node
from dsc.ir.kernels import Cpp, Formula, Lowering, Triton
from dsc.ir.op import InferFn, OpDef, TypeMismatch
from dsc.ir.ops.pointwise import broadcast
from dsc.ir.parser import parse_operands, parse_program, parse_type
from dsc.ir.printer import print_program
from dsc.ir.program import Program, program_of
from dsc.ir.stages import Stage
from dsc.ir.traits import Role, Traits, Within
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource
from dsc.pipeline import apply
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.pattern import Names, Pattern
from dsc.rewrite.rebuild import rebuild
from dsc.rewrite.registered import register_rule
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject

__all__ = [
    "Call",
    "Cpp",
    "DType",
    "DictSource",
    "Facts",
    "Formula",
    "Graph",
    "GraphBuilder",
    "Lowering",
    "Match",
    "Names",
    "Node",
    "Operator",
    "Pass",
    "PassReport",
    "Pattern",
    "Program",
    "Reject",
    "Result",
    "RewriteBuilder",
    "Role",
    "Rule",
    "Stage",
    "TensorType",
    "Traits",
    "Triton",
    "Within",
    "apply",
    "parse_program",
    "parse_type",
    "print_program",
    "program_of",
    "rebuild",
    "register_op",
    "register_rule",
    "reject",
]

_OURS = frozenset({Role.VIEW, Role.CONSTANT, Role.COLLECTIVE, Role.REGION, Role.WRITE})
"""Roles that kernels and plans know operators of by name."""


@dataclass(frozen=True)
class Operator:
    """A registered operator, to be called with tensors and attributes, eagerly or while traced."""

    definition: OpDef

    def __call__(self, *operands: Any, **attrs: Any) -> Any:
        """Its result on tensors: the reference's, or a node of what is being traced."""
        from dsc.frontends.ops import call

        return call(self.definition.name, *operands, **attrs)


def register_op(
    signature: str,
    traits: Traits,
    *,
    reference: Callable[..., Any],
    doc: str,
    example: str,
    infer: InferFn | None = None,
    within: Mapping[str, Within] | None = None,
    gives: Mapping[int, Within] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> Operator:
    """Declare an operator (`dsc.ir.op`) and how backends run it (`dsc.ir.kernels`), by name.

    `reference` is plain torch on the CPU and the operator's meaning. Raises `UsageError` for a
    signature, a role, an example or a name that cannot be taken.
    """
    try:
        made = declarations.op(
            signature, traits, reference=reference, doc=doc, example=example, infer=infer,
            within=within, gives=gives, kernels=kernels,
        )  # fmt: skip
    except ValueError as problem:
        hint = "write it as in `rms_norm(x: F[*n, d], weight: F[d]; eps: float) -> F[*n, d]`"
        raise UsageError(f"register_op: {problem}", hint=hint) from None
    if traits.role in _OURS:
        others = ", ".join(role.value for role in Role if role not in _OURS)
        raise UsageError(
            f"register_op: {made.name} has the role {traits.role.value}, which only dsc's own have",
            hint=f"one of {others}",
        )
    _check_example(made)
    _check_kernels(made)
    try:
        declarations.add(made)
    except ValueError as problem:
        raise UsageError(f"register_op: {problem}", hint="choose another name") from None
    _tell_torch(made)
    return Operator(made)


def _check_example(definition: OpDef) -> None:
    """Raise `UsageError` unless the example is a call of the operator."""
    try:
        operands, attrs = parse_operands(definition.example)
        types = [t for t, _ in operands]
        results = definition.infer(types, attrs)
        pointwise = definition.traits.role is Role.POINTWISE
        wanted = broadcast(*(t.shape for t in types)) if pointwise else None
        if not results or (pointwise and any(r.shape != wanted for r in results)):
            shown = ", ".join(map(str, results)) or "nothing"
            raise TypeMismatch(f"{definition.traits.role.value}, and it gives {shown}")
    except (ParseError, TypeMismatch) as problem:
        raise UsageError(
            f"register_op: the example of {definition.name} is no call of it: {problem}",
            hint="operand types, then attributes, as in `f32[2,3], f32[3] {eps=1e-06}`",
        ) from None


_TAKES: Mapping[str, tuple[type, ...]] = {
    "tvm": (Formula, Cpp, Lowering),
    "triton": (str, Triton, Lowering),
    "onnxruntime": (Lowering,),
}
_NUMBERS = ("int", "extent", "dim", "float", "bool")


def _check_kernels(definition: OpDef) -> None:
    """Raise `UsageError` for a kernel that is not told every attribute, or cannot be used.

    Its backend may not take such kernels, or not for an operator of the role.
    """
    for backend, kernel in definition.kernels.items():
        wrong = _misfit(definition, backend, kernel) or _untold(definition, kernel)
        if wrong is not None:
            what, hint = wrong
            whose = f"the kernel of {definition.name} for {backend}"
            raise UsageError(f"register_op: {whose} {what}", hint=hint)


def _misfit(definition: OpDef, backend: str, kernel: Any) -> tuple[str, str] | None:
    """What is wrong with the kind of a kernel, and what to do."""
    kinds, role = _TAKES.get(backend, (object,)), definition.traits.role
    words = " or ".join("a text" if kind is str else kind.__name__ for kind in kinds)
    if not isinstance(kernel, kinds):
        return f"is a {type(kernel).__name__}", f"{backend} takes {words}"
    if isinstance(kernel, Formula | str) and role is not Role.POINTWISE:
        others = " or ".join(kind.__name__ for kind in kinds if kind not in (str, Formula))
        hint = f"give Role.POINTWISE if that is what the operator is, or {others}"
        return f"is of one element, and the role is {role.value}", hint
    return None


def _untold(definition: OpDef, kernel: Any) -> tuple[str, str] | None:
    """What a kernel's text is not told of the operator, and what to do."""
    attrs = {a.name: a.kind for a in definition.attrs}
    letters = {letter for operand in definition.operands for letter in operand.pattern.dims}
    odd = sorted(name for name, kind in attrs.items() if kind not in _NUMBERS)
    if odd and isinstance(kernel, Cpp | str):
        what = f"cannot be told {odd[0]}, which is {attrs[odd[0]]}"
        return what, "attributes here are numbers; a Lowering is given the node with all of them"
    match kernel:
        case str():
            known = {str(i) for i in range(len(definition.operands))} | attrs.keys()
            unknown, untold = _fields(kernel) - known, attrs.keys() - _fields(kernel)
            hint = "operands are {0}, {1}, attributes, all of them, their names in braces"
        case Cpp() | Triton():
            unknown, untold = {*kernel.sizes} - letters - attrs.keys(), {*attrs} - {*kernel.sizes}
            if isinstance(kernel, Triton):
                unknown |= {*kernel.grid, *kernel.blocks.values()} - letters
            hint = "`sizes` names letters of operands, and all attributes"
            hint += f": {', '.join(sorted(attrs))}" if attrs else "; grid and blocks letters alone"
        case _:
            return None
    said = [f"is not told {', '.join(sorted(untold))}"] if untold else []
    said += [f"asks for {', '.join(sorted(unknown))}, which it cannot be told"] if unknown else []
    return (" and ".join(said), hint) if said else None


def _fields(text: str) -> set[str]:
    """The names in braces of an expression."""
    try:
        return {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError:
        return {text}


def _tell_torch(definition: OpDef) -> None:
    """Register with torch what is declared after the others were registered."""
    import sys

    ops = sys.modules.get("dsc.frontends.ops")
    if ops is not None:
        ops.register(definition)
