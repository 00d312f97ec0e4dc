"""How a model is called where that is not as its graph is: other inputs and outputs around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dsc.backends.onnxruntime.graph import GraphWriter
from dsc.ir.dims import Dim
from dsc.ir.types import DType


@dataclass(frozen=True)
class Port:
    """An input or an output as a model declares it."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]
    doc: str = ""


class Signature(Protocol):
    """Inputs and outputs of a model, and the nodes between them and its graph's own."""

    @property
    def inputs(self) -> Sequence[Port]:
        """What the model takes."""
        ...

    @property
    def outputs(self) -> Sequence[Port]:
        """What it gives."""
        ...

    def enter(self, g: GraphWriter) -> dict[str, str]:
        """Append what makes the graph's inputs; their values by name."""
        ...

    def leave(self, g: GraphWriter, results: Mapping[str, str]) -> list[str]:
        """Append what makes `outputs`, in order, from the graph's results by name."""
        ...
