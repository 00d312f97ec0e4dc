"""One step of a causal language model, in the form that is traced: states in, states out.

Every model reaches the tracer with the same signature (see `CausalLMStep.forward`). Models of
`models/` have it already; `CausalLMStep` gives it to any stock transformers decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dsc.errors import DscError, UnsupportedArchitecture
from dsc.frontends.instantiate import trace_by_kind
from dsc.frontends.longrope import fix_longrope
from dsc.frontends.registries import replaced
from dsc.frontends.signature import Signature
from dsc.frontends.states import cache_argument, own_cache, positions_for, signature_of
from dsc.frontends.stock import HINT
from dsc.frontends.temperature import fix_temperature
from dsc.frontends.torch_export import trace
from dsc.ir.dims import Range
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.models.v3 import append

_STATE = frozenset({"_modules", "_parameters", "_buffers"})


def trace_step(
    module: nn.Module,
    signature: Signature,
    symbols: Mapping[str, Range],
    *,
    whole: bool = False,
) -> Program:
    """Trace one step of `module` to a program with the entry `step`.

    One layer of each kind is traced and the others are written down, where that is sound (see
    `instantiate.py`); with `whole`, every layer is traced, about half a second each.

    Raises `UnsupportedArchitecture` for whatever a stock model raises while it is traced.
    """
    device = next(module.parameters()).device

    def traced(part: nn.Module, layers: Sequence[int] | None) -> Program:
        own = signature if layers is None else signature.only(layers)
        return trace(
            part,
            own.example_inputs(device=device),
            name="step",
            dynamic_shapes=own.dynamic_shapes(),
            input_names=own.input_names(),
            output_names=own.output_names(),
            symbols=symbols,
            aliases=own.cache_names(),
        )

    with _refusing(module):
        if whole:
            return traced(module, None)
        inputs = signature.example_inputs(device="meta")
        names = signature.input_names(), signature.output_names()
        return trace_by_kind(module, inputs, *names, traced)


@contextmanager
def _refusing(module: nn.Module) -> Iterator[None]:
    try:
        yield
    except (DscError, OSError, MemoryError):
        raise
    except Exception as problem:
        if not isinstance(module, CausalLMStep):
            raise
        first = str(problem).strip().partition("\n")[0]
        name = module.stock_class.__name__
        raise UnsupportedArchitecture(
            f"{name} cannot be traced: {type(problem).__name__}: {first:.200}", hint=HINT
        ) from problem


def parameter_types(module: nn.Module) -> dict[str, TensorType]:
    """Name and type of all that a checkpoint must supply: parameters and persistent buffers."""
    return {
        name: TensorType(DType.of(tensor.dtype), tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
    }


class CausalLMStep(nn.Module):
    """A stock causal LM of transformers behind the step's signature.

    The parts of the model are the step's own, so that parameters and traced module paths read as
    in the checkpoint (`model.layers.3.self_attn.k_proj.weight`); the model around them is put
    together for each run from the parts that are there then.

    transformers itself appends to a cache by concatenation and masks by row number: it knows no
    `lengths`. The step brings a cache that writes at `lengths`, and masks by them
    (`registries.py`); so sequences of different lengths share a batch, and every row of the
    signature means what it says. The modelling code is stock.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        signature: Signature | None = None,
        context: int | None = None,
    ) -> None:
        """Take a model apart; `context` are the tokens that it is for.

        See `longrope.py` and `temperature.py`.
        """
        super().__init__()
        for name in _STATE:
            self.__dict__[name] = dict(vars(causal_lm)[name])
        self.config: Any = causal_lm.config
        self.signature = signature or signature_of(causal_lm)
        self.stock_class = type(causal_lm)
        self.outer = {k: v for k, v in vars(causal_lm).items() if k not in {*_STATE, "config"}}
        self._non_persistent_buffers_set = causal_lm._non_persistent_buffers_set
        self.training = False
        fix_longrope(self, context)
        fix_temperature(self, context)

    def stock(self) -> nn.Module:
        """The stock model, of the parts that the step has now."""
        model = self.stock_class.__new__(self.stock_class)
        own = {name: vars(self)[name] for name in _STATE}
        vars(model).update({**self.outer, **own, "config": self.config})
        return model

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        logits_at: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            input_ids: new tokens, i64[B,S].
            positions: their positions, i64[B,S].
            lengths: tokens already cached, i64[B].
            logits_at: which of the S new tokens' logits are wanted, i64[B,L].
            past: the states in order of the signature, rows [B,P,width].

        Returns:
            logits [B,L,vocab], then the states with the new rows, [B,P+S,width].
        """
        model = self.stock()

        def grow(before: Tensor | None, new: Tensor) -> Tensor:
            assert before is not None, "a layer appends to a state that was not found"
            return append(before, new, lengths)

        cache = own_cache(self.config, grow)
        for state, rows in zip(self.signature.states, past, strict=True):
            layer = cache.layers[state.layer]
            layer.rows[state.part] = rows
            layer.is_initialized = True
        with replaced(lengths), wanted(model, logits_at) as found:
            logits = model(
                input_ids=input_ids,
                **positions_for(model, positions),
                **{cache_argument(model): cache},
                use_cache=True,
            ).logits
        return found(logits), *(cache.layers[s.layer].rows[s.part] for s in self.signature.states)


@contextmanager
def wanted(model: Any, logits_at: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Have the model's head see the wanted rows of hidden states alone.

    What is yielded takes the logits that come out to those that are wanted: they are already,
    unless the model has no head of its own.
    """
    head = model.get_output_embeddings()

    def taken(rows: Tensor) -> Tensor:
        return rows.gather(1, logits_at.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))

    if head is None:
        yield taken
        return
    hook = head.register_forward_pre_hook(lambda _, args: (taken(args[0]), *args[1:]))
    try:
        yield lambda logits: logits
    finally:
        hook.remove()
