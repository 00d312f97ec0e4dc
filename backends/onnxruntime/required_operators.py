"""required_operators.config: what a reduced build of ONNX Runtime must have to run the models.

Builds for the web and for phones take it as `--include_ops_by_config`. A line is a domain, the
version of its operators, and those that are used (onnxruntime, docs/Reduced_Operator_Kernel_build).
What ONNX Runtime itself fuses or writes out when it loads a model is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import GraphProto, ModelProto

CONFIG = "required_operators.config"
STANDARD = "ai.onnx"


def required_operators(models: Iterable[ModelProto]) -> str:
    """The file for models that one build has to run."""
    found: dict[tuple[str, int], set[str]] = {}
    for model in models:
        versions = {opset.domain: opset.version for opset in model.opset_import}
        for domain, operator in _operators(model.graph):
            found.setdefault((domain or STANDARD, versions[domain]), set()).add(operator)
    lines = [f"{d};{v};{','.join(sorted(ops))}" for (d, v), ops in sorted(found.items())]
    return "\n".join(lines) + "\n"


def _operators(graph: GraphProto) -> Iterator[tuple[str, str]]:
    """Domain and type of every node, those of branches and bodies too."""
    for node in graph.node:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operators(attribute.g)
