"""A session: one batch of sequences being generated, with its KV cache.

The same over every backend: it reads from the entry's signature whether caches are written in
place, lie in pages or are returned grown, cuts prompts into chunks, and chooses the entry for each
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsc.errors import UsageError
from dsc.ir.dims import Sym
from dsc.ir.graph import Graph, Value
from dsc.ir.paging import BLOCK_TABLE, page_rows
from dsc.ir.program import Program
from dsc.runtime.pages import PagePool, page_memory
from dsc.runtime.profiler import entry_span

if TYPE_CHECKING:
    import torch

    from dsc.backends.base import Executable

LM_INPUTS = ("input_ids", "positions", "lengths", "logits_at")


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache of an entry: the input that takes it, the output that gives it back."""

    input: Value
    output: str
    in_place: bool


class Session:
    """Generates with a compiled causal language model.

    `max_batch` sequences of up to `max_context` tokens each; prompts run in chunks of
    `prefill_chunk`. Ids are int64 torch tensors or numpy arrays (lists are taken too); logits come
    back as the kind that went in, torch for lists.
    """

    def __init__(
        self,
        executable: Executable,
        program: Program,
        max_batch: int = 1,
        max_context: int = 4096,
        prefill_chunk: int = 512,
    ) -> None:
        _check_limits(program, max_batch, max_context)
        self.executable = executable
        self.program = program
        self.max_batch = max_batch
        self.max_context = max_context
        self.prefill_chunk = min(prefill_chunk, _high(program, "S", prefill_chunk))
        self._guards: Mapping[str, int] = program.meta.get("guards", {})
        graph = program.entries[self._entry(2)]
        self._vocab = _vocabulary(graph, program)
        self._specs = cache_specs(graph)
        rows = page_rows(graph)
        self._pool = None if rows is None else PagePool(max_batch * -(-max_context // rows), rows)
        self._caches: dict[str, torch.Tensor] = {}
        self._lengths: torch.Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence in the cache."""
        return [] if self._lengths is None else [int(n) for n in self._lengths]

    def reset(self) -> None:
        """Forget all sequences; pages go back to the pool."""
        if self._pool is None:
            self._caches.clear()
        else:
            self._pool.release()
        self._lengths = None

    def prefill(
        self, ids: Any, lengths: Sequence[int] | None = None, all_logits: bool = False
    ) -> Any:
        """Append prompts to the sequences; the first call starts them.

        `ids` is [B, S] (or [S] for one sequence), padded on the right where `lengths` [B] says
        that sequences are shorter. Returns logits [B, vocab] of each sequence's last token, or
        [B, S, vocab] of all positions with `all_logits`. Raises `UsageError`.
        """
        tokens, like = _as_ids(ids)
        new = self._check_new(tokens, lengths)
        self._begin(tokens.shape[0])
        parts = []
        for start in range(0, tokens.shape[1], self.prefill_chunk):
            chunk = tokens[:, start : start + self.prefill_chunk]
            parts.append(self._chunk(chunk, new, start, all_logits))
        return _like(_joined(parts, new, self.prefill_chunk, all_logits), like)

    def decode(self, next_ids: Any) -> Any:
        """Append one token to each sequence. `next_ids` is [B] or [B, 1]; logits are [B, vocab]."""
        if self._lengths is None:
            raise UsageError("decode before prefill", hint="call session.prefill(ids) first")
        tokens, like = _as_ids(next_ids, column=True)
        if tokens.shape != (len(self._lengths), 1):
            shape = tuple(tokens.shape)
            raise UsageError(f"next_ids of shape {shape} for {len(self._lengths)} sequences")
        new = self._check_new(tokens, None)
        return _like(self._chunk(tokens, new, 0, False)[:, 0], like)

    def _chunk(
        self, chunk: torch.Tensor, new: torch.Tensor, start: int, all_logits: bool
    ) -> torch.Tensor:
        """Run one step over `chunk`, the tokens from `start` on of sequences of `new` tokens."""
        import torch

        assert self._lengths is not None
        size = chunk.shape[1]
        here = (new - start).clamp(0, size)
        wanted = (
            torch.arange(size)[None]
            if all_logits
            else (new - 1 - start).clamp(0, size - 1)[:, None]
        )
        offsets = torch.arange(size)[None]
        inputs = {
            "input_ids": chunk.contiguous(),
            "positions": (self._lengths[:, None] + offsets).contiguous(),
            "lengths": self._lengths.contiguous(),
            "logits_at": wanted.expand(chunk.shape[0], -1).contiguous(),
        }
        if self._pool is not None:
            self._pool.grow((self._lengths + here).tolist())
            inputs[BLOCK_TABLE] = self._pool.table()
        entry = self._entry(size if inputs["logits_at"].shape[1] == 1 else max(size, 2))
        given = {**inputs, **self._caches}
        with entry_span(self.program.entries[entry], given):
            outputs = self.executable.run(entry, given)
        self._lengths = self._lengths + here
        self._keep(outputs)
        return outputs["logits"]

    def _keep(self, outputs: Mapping[str, torch.Tensor]) -> None:
        assert self._lengths is not None
        longest = int(self._lengths.max())
        for spec in self._specs:
            if not spec.in_place:
                grown = outputs[spec.output]
                kept = grown if grown.shape[1] == longest else grown[:, :longest].contiguous()
                self._caches[spec.input.name] = kept

    def _begin(self, batch: int) -> None:
        import torch

        if self._lengths is not None:
            if len(self._lengths) != batch:
                raise UsageError(
                    f"{batch} sequences where the session holds {len(self._lengths)}",
                    hint="give as many rows, or call session.reset()",
                )
            return
        self._lengths = torch.zeros(batch, dtype=torch.int64)
        if self._pool is not None:
            self._take_pages(self._pool)
            return
        rows = self.max_context + self.prefill_chunk
        for spec in self._specs:
            width = [d for d in spec.input.type.shape[2:] if isinstance(d, int)]
            shape = (batch, rows if spec.in_place else 0, *width)
            self._caches[spec.input.name] = torch.zeros(shape, dtype=spec.input.type.dtype.torch)

    def _take_pages(self, pool: PagePool) -> None:
        """The memory of all pages; what former sequences left there is never seen."""
        for spec in self._specs:
            width = spec.input.type.shape[2]
            if spec.input.name not in self._caches:
                assert isinstance(width, int)
                memory = page_memory(pool.count, pool.rows, width, spec.input.type.dtype)
                self._caches[spec.input.name] = memory

    def _entry(self, size: int) -> str:
        """The entry for a step of `size` new tokens: the first whose guard admits it."""
        for name, limit in self._guards.items():
            if name in self.program.entries and (limit == 0 or size <= limit):
                return name
        return next(reversed(list(self.program.entries)))

    def _check_new(self, tokens: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
        import torch

        batch, size = tokens.shape
        if not 1 <= batch <= self.max_batch:
            raise UsageError(
                f"a batch of {batch}", hint=f"this session takes 1 to {self.max_batch}"
            )
        if size == 0:
            raise UsageError("an empty prompt", hint="give at least one token")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (self._vocab is not None and high >= self._vocab):
            raise UsageError(f"token ids {low}..{high} outside of the vocabulary of {self._vocab}")
        new = torch.full((batch,), size) if lengths is None else torch.as_tensor(list(lengths))
        if new.shape != (batch,) or int(new.min()) < 1 or int(new.max()) > size:
            raise UsageError(
                f"lengths {new.tolist()} for ids of shape [{batch}, {size}]",
                hint="one length a sequence, each from 1 to the width of ids",
            )
        held = self._lengths if self._lengths is not None and len(self._lengths) == batch else 0
        longest = int((new + held).max())
        if longest > self.max_context:
            raise UsageError(
                f"a sequence of {longest} tokens, max_context is {self.max_context}",
                hint="open the session with a larger max_context",
            )
        return new


def cache_specs(graph: Graph) -> list[CacheSpec]:
    """The caches of an entry. In place: the output has the input's type."""
    specs = []
    for output, source in graph.aliases:
        value = graph.inputs[source]
        in_place = graph.outputs[output].type == value.type
        specs.append(CacheSpec(value, graph.output_names[output], in_place))
    return specs


def _check_limits(program: Program, max_batch: int, max_context: int) -> None:
    if any(
        name not in {v.name for v in g.inputs}
        for g in program.entries.values()
        for name in LM_INPUTS
    ):
        raise UsageError(
            f"{program.name} is no causal language model",
            hint="run its entries with CompiledModel.run(entry, inputs)",
        )
    rows = next((r for r in map(page_rows, program.entries.values()) if r is not None), 1)
    limits = (("B", 1, max_batch), ("P", 1, max_context), ("C", 1, max_context))
    for name, unit, wanted in (*limits, ("M", rows, max_context)):
        most = _high(program, name, wanted) * (unit if name in program.symbols else 1)
        if not 1 <= wanted <= most:
            option = "max_batch" if name == "B" else "max_context"
            raise UsageError(
                f"{option} is {wanted}",
                hint=f"it was compiled for 1 to {most}; compile with a larger {option}",
            )


def _high(program: Program, name: str, default: int) -> int:
    found = program.symbols.get(name)
    return default if found is None else found.hi


def _vocabulary(graph: Graph, program: Program) -> int | None:
    for node in graph.nodes:
        if node.op == "embedding" and any(x.name == "input_ids" for x in node.operands):
            size = node.operands[1].type.shape[0]
            return None if isinstance(size, Sym) else size
    return None


def _as_ids(ids: Any, column: bool = False) -> tuple[torch.Tensor, str]:
    import torch

    like = "numpy" if isinstance(ids, np.ndarray) else "torch"
    tokens = torch.as_tensor(ids)
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() not in (1, 2):
        raise UsageError(
            f"ids of {tokens.dtype} and shape {tuple(tokens.shape)}; int64 [B, S] needed"
        )
    if tokens.dim() == 1:
        tokens = tokens[:, None] if column else tokens[None]
    return tokens.to(torch.int64), like


def _joined(
    parts: list[torch.Tensor], new: torch.Tensor, chunk: int, all_logits: bool
) -> torch.Tensor:
    """All positions in order, or each sequence's row from the chunk its last token is in."""
    import torch

    if all_logits:
        return torch.cat(parts, 1)
    last = ((new - 1) // chunk).tolist()
    return torch.stack([parts[index][row, 0] for row, index in enumerate(last)])


def _like(logits: torch.Tensor, like: str) -> Any:
    return logits.float().numpy() if like == "numpy" else logits
