"""Whether every decoder's tensors are found again in what transformers saves of it, bit for bit.

    python -m bench.names [TYPE ...]

A small random model of each causal type of the installed transformers is saved by its own
`save_pretrained`, in the layout in which it is published. Its names are mapped with nothing but
the file's header and the table of its class, as it comes back from JSON; then the expressions are
evaluated and held against the model. Prints a line for each type that fails, and why.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsc.errors import DscError
from dsc.frontends.catalogue import classes, example
from dsc.frontends.conversions import Conversions, conversions_of
from dsc.frontends.facts import Facts
from dsc.frontends.names import WeightMap, map_weights
from dsc.frontends.self_check import twin
from dsc.frontends.shrunk import shrunk
from dsc.frontends.stock import clean, stock_class, stock_config
from dsc.ir.op import type_of
from dsc.ir.safetensors import open_safetensors
from dsc.ir.types import TensorType
from dsc.ir.weights import WeightSource, evaluate

UNBUILT = "cannot be built"
MOST = 20_000_000
"""Parameters of a model that is built; a type whose configuration stays larger is told."""


def small_configs(model_type: str, **fields: Any) -> Iterator[tuple[Any, Any]]:
    """Classes and small configurations of a type, with these fields.

    First its class's own defaults, shrunk, which need not be what a file can say; then what a
    check before compiling would take, which has what defaults leave open.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        text = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
        config = type(text)(**shrunk(text.to_dict()) | fields)
        yield stock_class(clean({"model_type": model_type}), config), config
    except Exception:  # whatever its class raises
        config = None
    small = twin(example(model_type))
    config = stock_config(replace(small, values={**small.values, **fields}))
    yield stock_class(small, config), config


def small_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """A small model of a type, every parameter and stored buffer of it random."""
    problems = []
    random = torch.Generator().manual_seed(seed)
    for kind, config in small_configs(model_type, **fields):
        try:
            with quiet(), torch.no_grad():
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in kind(config).parameters())
                if size > MOST:
                    raise ValueError(f"{size} parameters")
                model = kind(config).eval()
                for tensor in model.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.copy_(torch.randn(tensor.shape, generator=random).to(tensor.dtype))
                return model
        except Exception as problem:  # whatever its class raises
            problems.append(problem)
    raise problems[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers tells of defaults."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def declared(model: Any) -> dict[str, TensorType]:
    """Names and types of all that a checkpoint must supply."""
    return {name: type_of(tensor) for name, tensor in model.state_dict().items()}


def table_of(model: Any) -> Conversions:
    """The table of a model, as it comes back from what is kept of it."""
    return Conversions.from_json(json.loads(json.dumps(conversions_of(model).to_json())))


def mapped(model: Any, source: WeightSource) -> WeightMap:
    """The map of a model's parameters to a source."""
    layers = getattr(model.config, "num_hidden_layers", None)
    facts = Facts(model.config.model_type, num_hidden_layers=layers)
    return map_weights(declared(model), source, facts, conversions=table_of(model))


def differing(model: Any, folder: Path) -> list[str]:
    """The parameters that do not come back from a saved model."""
    source = open_safetensors(folder)
    found = mapped(model, source)
    return [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(evaluate(found.weights[name], source), tensor)
    ]


def outcome(model_type: str) -> str:
    """What is wrong with a type; empty of one that comes back."""
    try:
        model = small_model(model_type)
    except Exception as problem:  # whatever its class raises
        return f"{UNBUILT}: {type(problem).__name__} {str(problem)[:120]!r}"
    with tempfile.TemporaryDirectory() as place:
        try:
            with quiet():
                model.save_pretrained(place)
            wrong = differing(model, Path(place))
        except DscError as problem:
            return str(problem).replace("\n", " | ")[:600]
        except Exception as problem:  # a bug of ours, or of saving
            return f"{type(problem).__name__} {str(problem)[:200]!r}"
    return f"{len(wrong)} differ: {wrong[:3]}" if wrong else ""


def figures() -> dict[str, Any]:
    """How many types come back; those that cannot be built small say nothing of names."""
    told = {model_type: outcome(model_type) for model_type in classes()}
    unbuilt = {name: why for name, why in told.items() if why.startswith(UNBUILT)}
    bad = {name: why for name, why in told.items() if why and name not in unbuilt}
    whole = len(told) - len(unbuilt) - len(bad)
    return {"ok": not bad, "types": whole, "bad": bad, "cannot be built": sorted(unbuilt)}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    types = parser.parse_args().types or list(classes())
    torch.set_num_threads(1)
    failed = 0
    for model_type in types:
        told = outcome(model_type)
        failed += bool(told)
        if told:
            print(f"{model_type}: {told}", flush=True)
    print(f"{len(types) - failed} of {len(types)} types come back bit for bit")


if __name__ == "__main__":
    main()
