"""Reads the text form. Never evaluates anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from dsc.errors import ParseError, VerificationError
from dsc.ir.dims import MAX_TOKENS, Dim, Range, parse_dim
from dsc.ir.formats import WHOLE, Format
from dsc.ir.graph import Attrs, Graph, Node, Operand, Value, Weight
from dsc.ir.interface import Interface
from dsc.ir.interface_text import parse_interface
from dsc.ir.kinds import KIND_WORDS, KINDS
from dsc.ir.lexer import Token, Tokens
from dsc.ir.op import OpDef, TypeMismatch, lookup
from dsc.ir.program import Program, program_of
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import Apply, MetaSource, Source, WeightExpr, WeightSource, source_types

MAX_DEPTH = 24


class _Typed(Protocol):
    @property
    def type(self) -> TensorType: ...


STAGES = tuple(Stage)


def parse_program(
    text: str, source: WeightSource | None = None, stages: Sequence[Stage] = STAGES
) -> Program:
    """Read a program. Weights come from `source`, or have types only. Raises `ParseError`.

    A bare graph is a program of one entry, at the first of `stages` where its operators are legal.
    Whether the program keeps the rules of the IR is for `parse_verified`, or for the verifier.
    """
    return _Parser(text).program(source, stages)


def parse_verified(
    text: str, source: WeightSource | None = None, stages: Sequence[Stage] = STAGES
) -> Program:
    """Read a program that somebody wrote: what the verifier finds is a `ParseError` as well."""
    parser = _Parser(text)
    program = parser.program(source, stages)
    try:
        verify(program)
    except VerificationError as problem:
        raise parser.located(problem) from None
    return program


def parse_graph(text: str) -> Graph:
    """Read one graph whose weights are declared in its header. Raises `ParseError`."""
    parser = _Parser(text)
    graph = parser.graph({}, 0)
    parser.end()
    return graph


def parse_type(text: str) -> TensorType:
    """Read the type of a tensor: `f32[B,8]`. Raises `ParseError`."""
    parser = _Parser(text)
    found = parser.tensor_type()
    parser.end()
    return found


def parse_operands(text: str) -> tuple[list[tuple[TensorType, int | None]], dict[str, Any]]:
    """Read an operator's example: `f32[2,3], i64[2]=4 {eps=1e-06}` as types with bounds and attrs.

    `=n` after an integer type says that its elements lie in 0..n. Attribute kinds are guessed.
    """
    parser = _Parser(text)
    return parser.example()


class _Parser(Tokens):
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.places: list[tuple[object, str, Token]] = []

    def program(self, source: WeightSource | None, stages: Sequence[Stage]) -> Program:
        if self.peek().kind == "end":
            raise ParseError(
                "the text holds comments alone" if self.text.strip() else "the text is empty",
                where="line 1, column 1",
                hint="give a program, as dsc inspect MODEL prints it",
            )
        if self.at_word("graph"):
            return self._bare(source, stages)
        self.word("program")
        name = self.string()
        self.sign("{")
        self.word("stage")
        self.sign("=")
        stage = self._stage()
        self.sign("}")
        meta = self._meta() if self.at_word("meta") else {}
        interface = parse_interface(self) if self.at_word("interface") else Interface()
        symbols = self._symbols() if self.at_word("symbols") else {}
        weights = self._weights() if self.at_word("weights") else {}
        types = {k: e.type for k, e in weights.items()}
        entries: dict[str, Graph] = {}
        while self.at_word("graph"):
            at = self.peek()
            graph = self.graph(types, 0)
            if graph.name in entries:
                raise self.error(f"a second graph {graph.name}", at)
            entries[graph.name] = graph
        self.end()
        if source is None:
            source = MetaSource(source_types(weights.values()))
        return Program(name, entries, weights, symbols, source, meta, stage, interface)

    def _bare(self, source: WeightSource | None, stages: Sequence[Stage]) -> Program:
        graph = self.graph({}, 0)
        self.end()
        return program_of(graph, source, stages)

    def located(self, problem: VerificationError) -> ParseError:
        """What the verifier found, where it stands in the text."""
        own = {part: token for found, part, token in self.places if found is problem.culprit}
        return self.error(problem.what, own.get(problem.part) or own.get("") or self.tokens[0])

    def graph(self, weights: Mapping[str, TensorType], depth: int) -> Graph:
        if depth > MAX_DEPTH:
            raise self.error(f"bodies nest deeper than {MAX_DEPTH}")
        self.word("graph")
        at = self.take("word", "a graph name")
        weights = dict(weights)
        scope: dict[str, Value] = {}
        inputs = self._parameters(scope, weights)
        self.sign("{")
        nodes = []
        while not self.at_word("return"):
            nodes.append(self._node(scope, weights, depth))
        end = self.peek()
        outputs, names, aliases = self._return(scope, weights, inputs)
        self.sign("}")
        found = Graph(at.text, tuple(inputs), tuple(nodes), outputs, names, aliases)
        self.places += [(found, "", at), (found, "return", end)]
        return found

    def example(self) -> tuple[list[tuple[TensorType, int | None]], dict[str, Any]]:
        operands: list[tuple[TensorType, int | None]] = []
        while self.peek().kind == "word":
            t = self.tensor_type()
            bound = self.integer("a bound") if self.skip("=") else None
            operands.append((t, bound))
            self.skip(",")
        attrs = self.attributes() if self.at_sign("{") else {}
        self.end()
        return operands, attrs

    def _parameters(self, scope: dict[str, Value], weights: dict[str, TensorType]) -> list[Value]:
        self.sign("(")
        inputs: list[Value] = []
        for _ in self.items(")"):
            token = self.next()
            self.sign(":")
            if token.kind == "weight":
                if token.text[1:] in weights:
                    raise self.error(f"{token.text} is declared twice", token)
                weights[token.text[1:]] = self.tensor_type()
            elif token.kind == "value":
                inputs.append(self._define(scope, token, self.tensor_type()))
            else:
                raise self.error("an input %name or a weight @name expected", token)
        return inputs

    def _return(
        self, scope: Mapping[str, Value], weights: Mapping[str, TensorType], inputs: list[Value]
    ) -> tuple[tuple[Operand, ...], tuple[str, ...], tuple[tuple[int, int], ...]]:
        self.word("return")
        outputs: list[Operand] = []
        names: list[str] = []
        aliases: list[tuple[int, int]] = []
        while not self.at_sign("}"):
            operand = self._operand(scope, weights)
            if operand is None:
                raise self.error("an output cannot be absent")
            outputs.append(operand)
            names.append(self.string() if self.skip_word("as") else operand.name)
            if self.skip_word("updates"):
                token = self.take("value", "an input")
                places = [i for i, v in enumerate(inputs) if v.name == token.text[1:]]
                if not places:
                    raise self.error(f"{token.text} is no input of this graph", token)
                aliases.append((len(outputs) - 1, places[0]))
            if not self.at_sign("}"):
                self.sign(",")
        return tuple(outputs), tuple(names), tuple(aliases)

    def _node(self, scope: dict[str, Value], weights: Mapping[str, TensorType], depth: int) -> Node:
        results = [self.take("value", "a result %name or return")]
        while self.skip(","):
            results.append(self.take("value", "a result %name"))
        self.sign("=")
        op_token = self.take("word", "an operator")
        definition = self._lookup(op_token)
        operands = self._operands(scope, weights)
        attrs = Attrs(self._attrs(definition, weights, depth) if self.at_sign("{") else {})
        types_at = op_token
        if self.skip(":"):
            types_at = self.peek()
            types = self._types()
        else:
            types = self._infer(definition, operands, attrs, op_token)
        loc = self.string() if self.skip_word("loc") else ""
        if len(types) != len(results):
            raise self.error(f"{len(results)} results for {len(types)} types", op_token)
        pairs = zip(results, types, strict=True)
        outputs = tuple(self._define(scope, token, t) for token, t in pairs)
        found = Node(definition.name, tuple(operands), attrs, outputs, loc)
        self.places += [(found, "", op_token), (found, "type", types_at)]
        return found

    def _operands(
        self, scope: Mapping[str, Value], weights: Mapping[str, TensorType]
    ) -> list[Operand | None]:
        operands: list[Operand | None] = []
        token = self.peek()
        if token.kind not in ("value", "weight") and token.text != "_":
            return operands
        # A new statement also starts with %name: it is followed by `=` or `,`.
        if token.kind == "value" and self._starts_statement():
            return operands
        operands.append(self._operand(scope, weights))
        while self.skip(","):
            operands.append(self._operand(scope, weights))
        return operands

    def _starts_statement(self) -> bool:
        j = self.i
        while self.tokens[j].kind == "value" and self.tokens[j + 1].text == ",":
            j += 2
        return self.tokens[j].kind == "value" and self.tokens[j + 1].text == "="

    def _operand(
        self, scope: Mapping[str, Value], weights: Mapping[str, TensorType]
    ) -> Operand | None:
        token = self.next()
        if token.text == "_":
            return None
        name = token.text[1:]
        if token.kind == "value":
            if name not in scope:
                raise self.error(f"{token.text} is not defined here", token)
            return scope[name]
        if token.kind == "weight":
            if name not in weights:
                raise self.error(f"{token.text} is not declared", token)
            return Weight(name, weights[name])
        number = token.kind in ("int", "float")
        raise self.error("an operand expected", token, _NUMBER if number else None)

    def _define(self, scope: dict[str, Value], token: Token, t: TensorType) -> Value:
        name = token.text[1:]
        if name in scope:
            raise self.error(f"{token.text} is defined twice", token)
        return scope.setdefault(name, Value(name, t))

    def _lookup(self, token: Token) -> OpDef:
        try:
            return lookup(token.text)
        except TypeMismatch as problem:
            raise self.error(str(problem), token, _IMPORT) from None

    def _infer(
        self, definition: OpDef, operands: Sequence[_Typed | None], attrs: Attrs, at: Token
    ) -> tuple[TensorType, ...]:
        try:
            return definition.infer([None if x is None else x.type for x in operands], attrs)
        except TypeMismatch as problem:
            raise self.error(f"{definition.name}: {problem}", at) from None

    def attributes(self) -> dict[str, Any]:
        return self._attrs(None, {}, 0)

    def _attrs(
        self, definition: OpDef | None, weights: Mapping[str, TensorType], depth: int
    ) -> dict[str, Any]:
        self.sign("{")
        attrs: dict[str, Any] = {}
        for _ in self.items("}"):
            token = self.take("word", "an attribute name")
            self.sign("=")
            declared = definition.attr(token.text) if definition else None
            if definition is not None and declared is None:
                raise self.error(f"{definition.name} has no attribute {token.text}", token)
            if token.text in attrs:
                raise self.error(f"attribute {token.text} given twice", token)
            at = self.peek()
            value = self._attr(declared.kind if declared else "any", weights, depth)
            if declared is not None and not KINDS[declared.kind](value):
                wanted = KIND_WORDS[declared.kind]
                raise self.error(f"attribute {token.text} is not {wanted}", at)
            attrs[token.text] = value
        return definition.widened(attrs) if definition else attrs

    def _attr(self, kind: str, weights: Mapping[str, TensorType], depth: int) -> Any:
        token = self.peek()
        if kind == "graph":
            return self.graph(weights, depth + 1)
        if token.text == "[":
            return self._list(kind, weights, depth)
        if token.kind == "string":
            return self.string()
        if token.text in ("true", "false"):
            return self.next().text == "true"
        if token.kind == "float":
            return float(self.next().text)
        if token.kind == "word" and kind in ("dtype", "any") and token.text in _DTYPES:
            return DType(self.next().text)
        return self._dim()

    def _list(self, kind: str, weights: Mapping[str, TensorType], depth: int) -> tuple[Any, ...]:
        if depth > MAX_DEPTH:
            raise self.error(f"lists nest deeper than {MAX_DEPTH}")
        self.sign("[")
        items = []
        for _ in self.items("]"):
            items.append(self._attr(kind, weights, depth + 1))
        return tuple(items)

    def _types(self) -> tuple[TensorType, ...]:
        types = [self.tensor_type()]
        while self.skip(","):
            types.append(self.tensor_type())
        return tuple(types)

    def tensor_type(self) -> TensorType:
        token = self.take("word", "a type")
        dtype = self._dtype(token)
        stored = self._format() if self.at_sign("{") else None
        self.sign("[")
        dims = tuple(self._dim() for _ in self.items("]"))
        return self.guarded(token, lambda: TensorType(dtype, dims, stored))

    def _dtype(self, token: Token) -> DType:
        if token.text not in _DTYPES:
            raise self.error(f"unknown element type {token.text}", token)
        return DType(token.text)

    def _format(self) -> Format:
        """Blocks, the type of their scales, and that of zero points: `{128x128,f32}`."""
        self.sign("{")
        token, block = self.peek(), ""
        while not self.at_sign(",") and self.peek().kind != "end":
            block += self.next().text
        sizes = re.fullmatch(r"(\*|[1-9][0-9]{0,17})x(\*|[1-9][0-9]{0,17})", block)
        if sizes is None:
            raise self.error("a block as in 128x128 or 1x* expected", token)
        rows, columns = (WHOLE if size == "*" else int(size) for size in sizes.groups())
        self.sign(",")
        scales = self._dtype(self.take("word", "the element type of scales"))
        zeros, tile, behind, unsigned = None, 1, False, False
        while self.skip(","):
            if (behind := self.skip_word("behind")) or (unsigned := self.skip_word("unsigned")):
                break
            word = self.take("word", "the element type of zero points, or a tile")
            if word.text == "tile":
                self.sign("=")
                tile = self.integer("rows side by side")
                break
            if zeros is not None:
                raise self.error("a tile expected", word)
            zeros = self._dtype(word)
        self.sign("}")
        last = (zeros, tile, behind, unsigned)
        return self.guarded(token, lambda: Format((rows, columns), scales, *last))

    def _dim(self) -> Dim:
        """Take the tokens of one expression, up to a comma or closing sign at its own depth."""
        first, depth = self.peek(), 0
        parts: list[str] = []
        while True:
            token = self.peek()
            if token.kind not in ("int", "word") and token.text not in _DIM_SIGNS:
                break
            if token.text == ")" and depth == 0:
                break
            atoms = ("int", "word")
            if parts and token.kind in atoms and self.tokens[self.i - 1].kind in atoms:
                break
            depth += (token.text == "(") - (token.text == ")")
            parts.append(self.next().text)
            if len(parts) > MAX_TOKENS:
                break
        return self.guarded(first, lambda: parse_dim("".join(parts)))

    def _meta(self) -> dict[str, Any]:
        self.word("meta")
        try:
            value, end = json.JSONDecoder().raw_decode(self.text, self.peek().at)
            if not isinstance(value, dict):
                raise ValueError("an object in braces is due")
        except (ValueError, RecursionError) as problem:
            raise self.error(f"the meta block is no JSON: {problem}") from None
        while self.peek().kind != "end" and self.peek().at < end:
            self.i += 1
        return value

    def _symbols(self) -> dict[str, Range]:
        self.word("symbols")
        self.sign("{")
        symbols: dict[str, Range] = {}
        for _ in self.items("}"):
            token = self.take("word", "a symbol")
            self.sign("=")
            self.sign("[")
            lo = self.integer("a lower bound")
            self.sign(",")
            hi = self.integer("an upper bound")
            self.sign("]")
            if token.text in symbols:
                raise self.error(f"a second range for {token.text}", token)
            symbols[token.text] = self.guarded(token, partial(Range, lo, hi))
        return symbols

    def _weights(self) -> dict[str, WeightExpr]:
        self.word("weights")
        self.sign("{")
        weights: dict[str, WeightExpr] = {}
        while not self.skip("}"):
            token = self.take("weight", "a weight @name")
            self.sign(":")
            declared = self.tensor_type()
            self.sign("=")
            expr = self._expr(0)
            if expr.type != declared:
                raise self.error(f"{token.text} is {declared}, its expression {expr.type}", token)
            if token.text[1:] in weights:
                raise self.error(f"{token.text} is declared twice", token)
            weights[token.text[1:]] = expr
        return weights

    def _expr(self, depth: int) -> WeightExpr:
        if depth > MAX_DEPTH:
            raise self.error(f"weight expressions nest deeper than {MAX_DEPTH}")
        token = self.take("word", "a weight expression")
        if token.text == "source":
            key = self.string()
            self.sign(":")
            return Source(key, self.tensor_type())
        definition = self._lookup(token)
        self.sign("(")
        args: list[WeightExpr] = []
        for _ in self.items(")"):
            args.append(self._expr(depth + 1))
        attrs = Attrs(self._attrs(definition, {}, depth) if self.at_sign("{") else {})
        results = self._infer(definition, args, attrs, token)
        if len(results) != 1:
            raise self.error(f"{token.text} has {len(results)} results; a weight is one", token)
        return Apply(definition.name, tuple(args), attrs, results[0])

    def _stage(self) -> Stage:
        token = self.take("word", "a stage")
        if token.text not in Stage.__members__:
            raise self.error(f"unknown stage {token.text}", token)
        return Stage[token.text]


_NUMBER = "a number is a value as well: %c = full {shape=[], value=0.5, dtype=f32}"
_IMPORT = "import the module that declares it; a package names it under `dsc.extensions`"
_DTYPES = frozenset(d.value for d in DType)
_DIM_SIGNS = frozenset({"+", "-", "*", "//", "(", ")"})
