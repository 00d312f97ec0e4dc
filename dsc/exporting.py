"""`dsc.export`: anything that dsc compiles, as ONNX in a folder for other people's runtimes.

    dsc.export("path/to/checkpoint", "out", server="genai")
    dsc.export(attention_layer, "out", args=(q, k, v), dynamic_shapes={"q": {0: "B"}})

Models are what `dsc.compile` takes. Functions, decorated by `dsc.optimize` or not, and plain
modules are traced on example arguments; sizes that may be others have names.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.errors import DscError, UsageError, VerificationError
from dsc.ir.dims import Range
from dsc.ir.lazy import torch
from dsc.ir.program import ANY_SIZE, Program
from dsc.ir.verifier import RESERVED, WORD

if TYPE_CHECKING:
    from dsc.api import CompiledModel

BACKEND = "onnxruntime"
NO_TOKENIZER = (
    "there is no tokenizer.json: example.py prints ids that continue the first token, until one"
    " lies beside it"
)


def export(
    model: Any,
    output: str | Path,
    *,
    args: Sequence[Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    onnx_ops: str | None = None,
    provider: str | None = None,
    caches: str | None = None,
    server: str | None = None,
    max_shard_size: int | str | None = None,
    check: bool = False,
    force: bool = False,
    **options: Any,
) -> Path:
    """Write `model` as ONNX into the folder `output`, whole or not at all.

    Args:
        model: what `dsc.compile` takes; a `.py` file that has `example_inputs(config)` too, with
            `dynamic_shapes` where sizes are open; with `args`, a function of tensors or a module.
        output: the folder; `dsc.load` opens it too.
        args: example arguments, tensors, for a function or a module.
        dynamic_shapes: as of `torch.export`: for an argument's name the names of sizes that are
            open, by axis, as texts or `torch.export.Dim`. Equal names are equal sizes.
        input_names: one a tensor; the function's own names for them by default.
        output_names: one a result; `out`, or `out.0`, `out.1`, ... by default.
        opset: of ONNX, 23 or 24.
        onnx_ops: "ort", ONNX Runtime's own operators too, by default; or "standard".
        provider: "cpu" or "cuda": whose kernels of ONNX Runtime the operators are chosen for.
        caches: the type of caches as inputs and outputs: "fp32", or what the model computes in.
        server: "genai", "optimum" or "triton-server": what that wants goes along.
        max_shard_size: bytes of weights in a file at most: a number, or as "5GB" (default: 50GB).
        check: hold what was written against onnx's checker and evaluator, and our interpreter.
        force: replace the folder that is there.
        options: others of `dsc.compile`: dtype, max_context, ...

    Raises:
        VerificationError: `check` found something; what was written stays there.
        DscError: one of its other classes, with what is wrong, where, and what to do.
    """
    if check:
        check_has_weights(model, options.get("weights"))
    if args is not None:
        model = traced(model, args, dynamic_shapes, input_names, output_names)
    elif dynamic_shapes or input_names or output_names:
        raise UsageError(
            "dynamic_shapes and names are of a function's or a module's arguments",
            hint="give args, the example arguments that it is traced on",
        )
    said = {"opset": opset, "onnx_ops": onnx_ops, "provider": provider}
    said |= {"caches": caches, "server": server, "max_shard_size": max_shard_size}
    given = {name: value for name, value in said.items() if value is not None}
    given |= options.pop("backend_options", None) or {}
    folder = exported(model, backend_options=given, **options).save(output, force)
    if check:
        from dsc.backends.onnxruntime.check import check as held

        found = held(folder)
        if found.failure:
            raise VerificationError(
                f"the export is not what it should be: {found.failure}", str(folder)
            )
    return folder


def check_has_weights(model: Any, weights: object) -> None:
    """Raise `UsageError` for an export without weights, which cannot be checked."""
    if weights == "none" or (isinstance(model, (str, Path)) and Path(model).suffix == ".dsc"):
        raise UsageError("check reads the weights too", hint="give weights, or leave out the check")


def exported(model: Any, **options: Any) -> CompiledModel:
    """What `dsc.compile` makes of `model` for ONNX Runtime, with what servers read beside it."""
    from dsc import api
    from dsc.frontends import python_file
    from dsc.frontends.beside import files_beside
    from dsc.frontends.folder import TOKENIZER

    if isinstance(model, (str, Path)) and Path(model).suffix == ".py":
        example = python_file.example_of(Path(model), options.get("config"))
        if example is not None:
            own = [name for name in ("weights", "dtype") if options.get(name) is not None]
            if own:
                raise UsageError(
                    f"a module with example inputs brings its {own[0]}",
                    where=str(model),
                    hint=f"leave out --{own[0]}",
                )
            options = {name: x for name, x in options.items() if name != "config"}
            model = traced(example.module, example.args, example.dynamic_shapes)
    options = {"backend": BACKEND, **options}
    given = options.get("backend_options") or {}
    options["backend_options"] = {"indices": False, **given}
    if options["backend"] != BACKEND:
        raise UsageError(f"{options['backend']} writes no ONNX", hint="leave out the backend")
    compiled = api.compile(model, **options)
    folder = Path(compiled.source) if compiled.source else None
    known = compiled._files
    beside, notes = files_beside(folder if folder and folder.is_dir() else None, known)
    told = [*compiled.report.get("notes", []), *notes]
    compiled._files = {**beside, **known}
    if compiled.program.is_causal_lm and TOKENIZER not in compiled._files:
        told.append(NO_TOKENIZER)
    compiled.report = {**compiled.report, "notes": told}
    return compiled


def traced(
    target: Any,
    args: Sequence[Any],
    dynamic_shapes: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Program:
    """The program of a function or a module on example arguments.

    Raises:
        UsageError: it is neither, or cannot be traced.
        UnsupportedOperator: naming every operator without a translation.
    """
    from dsc.frontends.torch_export import trace

    module = _as_module(target)
    try:
        bound = inspect.signature(module.forward).bind(*args)
    except TypeError as problem:
        raise UsageError(f"args do not fit: {problem}", hint="one for each parameter") from None
    except ValueError:  # of what is written in C
        raise UsageError(
            f"{_name_of(target)} does not tell its parameters",
            hint="call it from a function of your own",
        ) from None
    if not isinstance(dynamic_shapes or {}, Mapping):
        raise UsageError("dynamic_shapes is no mapping", hint="give sizes by an argument's name")
    named = {p: _dims(shape) for p, shape in (dynamic_shapes or {}).items()}
    strange = [name for name in named if name not in bound.arguments]
    if strange:
        raise UsageError(
            f"dynamic_shapes names {strange[0]}, and there is no such argument",
            hint=f"one of {', '.join(bound.arguments)}",
        )
    for name, dims in named.items():
        given = bound.arguments[name]
        if isinstance(given, torch.Tensor):
            _check_axes(name, given.dim(), dims)
    shapes = {name: named.get(name) for name in bound.arguments} if named else None
    if input_names is None and all(isinstance(x, torch.Tensor) for x in args):
        plain = [p for p in bound.arguments if p not in ("args", "kwargs")]
        input_names = plain if len(plain) == len(args) else None
    name = _name_of(target)
    try:
        program = trace(
            module,
            tuple(args),
            shapes,
            name=name,
            input_names=input_names,
            output_names=output_names,
            symbols=_bounds(named),
        )
    except Exception as problem:
        if isinstance(problem, DscError) or _is_ours(problem):
            raise
        told = str(problem).splitlines() or [""]
        raise UsageError(
            f"{name} cannot be traced: {type(problem).__name__}: {told[0]}",
            hint="see that it runs on the example arguments, tensors and numbers",
        ) from problem
    if not program.entries[name].outputs:
        raise UsageError(f"{name} gives no tensor", hint="return what it computes")
    return program


def _check_axes(name: str, rank: int, dims: Any) -> None:
    """Raise `UsageError` where sizes of a tensor are not said by its axes."""
    strange = [x for x in dims if x not in range(rank)] if isinstance(dims, Mapping) else []
    if strange:
        raise UsageError(
            f"dynamic_shapes names axis {strange[0]!r} of {name}, which has {rank}",
            hint="axes are counted from 0",
        )
    if not isinstance(dims, Mapping | list | tuple | None):
        raise UsageError(
            f"dynamic_shapes says {dims!r} of {name}", hint='say of which axis: {0: "B"}'
        )


def _is_ours(problem: BaseException) -> bool:
    """Whether code of dsc raised it, and neither torch nor the function."""
    *_, (frame, _) = traceback.walk_tb(problem.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("dsc.")


def _name_of(target: Any) -> str:
    """What the program of a function or a module is called, in letters that a graph's name has.

    >>> _name_of(lambda x: x)
    '_lambda_'
    """
    name = getattr(target, "__name__", type(target).__name__)
    return re.sub(r"\W+", "_", name, flags=re.ASCII)


def _as_module(target: Any) -> Any:
    """A module whose `forward` is `target`, without what `dsc.optimize` put around it."""
    plain = getattr(target, "_orig_mod", getattr(target, "_torchdynamo_orig_callable", target))
    if isinstance(plain, torch.nn.Module):
        return plain.eval()
    if not callable(plain):
        raise UsageError(
            f"a {type(target).__name__} is no function of tensors", hint="leave out args"
        )
    module: Any = torch.nn.Module()
    module.forward = plain
    return module


def _dims(shape: Any) -> Any:
    """What `torch.export` is told of an argument's sizes, names as its `Dim`s."""
    if isinstance(shape, Mapping):
        return {axis: _dims(dim) for axis, dim in shape.items()}
    if isinstance(shape, (list, tuple)):
        return type(shape)(_dims(dim) for dim in shape)
    if not isinstance(shape, str):
        return shape
    if not WORD.fullmatch(shape) or shape in RESERVED:
        raise UsageError(
            f"dynamic_shapes calls a size {shape!r}",
            hint="letters, digits and _ make its name; inf, nan, true and false are none",
        )
    return torch.export.Dim(shape)


def _bounds(shapes: Any) -> dict[str, Range]:
    """The range of each named size."""
    if isinstance(shapes, torch.export.Dim):
        most = ANY_SIZE if str(shapes.max) == "int_oo" else int(shapes.max)
        return {shapes.__name__: Range(max(1, int(shapes.min)), min(most, ANY_SIZE))}
    parts = shapes.values() if isinstance(shapes, Mapping) else shapes
    nested = map(_bounds, parts) if isinstance(parts, Iterable) else ()
    return {name: bounds for part in nested for name, bounds in part.items()}
