"""Run this artifact: python run.py "a prompt". It needs numpy, tokenizers and onnxruntime."""

from __future__ import annotations

import json  # noqa: F401  (the second half of run.py reads the manifest)
import os  # noqa: F401  (and writes to a descriptor)
import pathlib
import sys
from typing import Any

try:
    import numpy as np
    import onnxruntime
except ImportError as missing:
    sys.exit(f"run.py: {missing}; pip install numpy tokenizers onnxruntime")

TOKENS = ("input_ids", "positions", "lengths", "logits_at")
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Array = np.ndarray[Any, Any]
_value = onnxruntime.OrtValue.ortvalue_from_numpy  # over the memory of an array


class Model:
    """A model and its cache. Sequences are rows of a batch; they may differ in length."""

    def __init__(self, folder: str | pathlib.Path, threads: int | None = None) -> None:
        """Read the manifest of `folder`. Each ONNX model is opened when first needed."""
        self.folder = pathlib.Path(folder)
        self._manifest = (self.folder / "dsc.json").read_text()
        manifest: Any = described(self.folder)  # type: ignore[name-defined]  # noqa: F821
        meta, needs = manifest["meta"], manifest["needs"]["onnxruntime"]
        versions = (needs.partition(">=")[2], onnxruntime.__version__)
        least, installed = ([int(part) for part in v.split(".")[:2]] for v in versions)
        if installed < least:
            raise ImportError(f"onnxruntime {versions[1]} is too old; pip install '{needs}'")
        self.chunk: int = manifest["limits"]["prefill_chunk"]
        self.context: int = manifest["limits"]["max_context"]
        self._checks = meta["checks"]
        self.threads = threads or meta["threads"] or 0
        self._prepack: bool = meta["prepack"]
        self._models, self._guards = meta["models"], meta["guards"]
        self._sessions: dict[str, Any] = {}
        self._caches: dict[str, Any] = {}

    def step(self, input_ids: Array, positions: Array, lengths: Array, logits_at: Array) -> Array:
        """Run new tokens [B, S] of sequences that have `lengths` [B] tokens in the cache.

        Returns float32 logits [B, L, vocab] of the tokens `logits_at` [B, L], indices into S.
        Raises ValueError for what the model was not compiled for.
        """
        given = (input_ids, positions, lengths, logits_at)
        tokens = {n: np.ascontiguousarray(x) for n, x in zip(TOKENS, given, strict=True)}
        self._admit(tokens)
        session = self._session(input_ids.shape[1], logits_at.shape[1])
        feeds = {name: _value(x) for name, x in tokens.items()}
        for spec in session.get_inputs():
            if spec.name not in tokens:
                feeds[spec.name] = self._past(spec, len(input_ids), int(np.max(lengths)))
        names = [spec.name for spec in session.get_outputs()]
        results = dict(zip(names, session.run_with_ort_values(names, feeds), strict=True))
        logits = results.pop("logits").numpy()
        self._caches = {name.replace("present", "past", 1): x for name, x in results.items()}
        return np.asarray(logits, dtype=np.float32)

    def _admit(self, tokens: dict[str, Array]) -> None:
        """Look at shapes, and at the values that point into tensors, before anything runs."""
        rows = {x.ndim and x.shape[0] for x in tokens.values()}
        ids, lengths, wanted = (tokens[name] for name in ("input_ids", "lengths", "logits_at"))
        fitting = ids.ndim == wanted.ndim == 2 and lengths.ndim == 1 and len(rows) == 1
        whole = all(x.dtype == np.int64 and x.size for x in tokens.values())
        if not fitting or not whole or tokens["positions"].shape != ids.shape:
            raise ValueError("int64 [B, S], [B, S], [B] and [B, L] are wanted, none of them empty")
        held = next((x.shape() for x in self._caches.values()), [len(ids), 0])
        sizes = {"B": len(ids), "S": ids.shape[1], "L": wanted.shape[1], "P": held[1]}
        if lengths.any() and held[0] != len(ids):
            raise ValueError(f"{len(ids)} sequences, the cache holds {held[0]}")
        longest = max(lengths.max(), lengths.min() + ids.shape[1])  # the rest may be padding
        if longest > self.context or ids.shape[1] > self.chunk:
            raise ValueError(f"more than {self.context} tokens, or {self.chunk} at once")
        for name, low, high, what in self._checks:
            least, most = (eval(text, {"__builtins__": {}}, sizes) for text in (low, high))
            if tokens[name].min() < least or tokens[name].max() > most:
                raise ValueError(f"{name}: each is {what}, {least} to {most} here")

    def _past(self, spec: Any, rows: int, longest: int) -> Any:
        """The cache as an input, cut to `longest` rows: what follows was padding."""
        if longest == 0:
            return _value(np.zeros((rows, 0, spec.shape[2]), NUMPY[spec.type]))
        held = self._caches[spec.name]
        if held.shape()[1] == longest:
            return held
        return _value(np.ascontiguousarray(held.numpy()[:, :longest]))

    def _session(self, new: int, wanted: int) -> Any:
        """The session of the first entry whose guard admits `new` tokens."""
        size = new if wanted == 1 else max(new, 2)
        admitted = (name for name, limit in self._guards.items() if limit == 0 or size <= limit)
        path = self._models[next(admitted, list(self._models)[-1])]
        if path not in self._sessions:
            if (self.folder / "dsc.json").read_text() != self._manifest:
                raise ValueError(f"{self.folder} was compiled anew; open it again")
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.add_session_config_entry(
                "session.disable_prepacking", "0" if self._prepack else "1"
            )
            options.intra_op_num_threads = self.threads
            self._sessions[path] = onnxruntime.InferenceSession(
                str(self.folder / path), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[path]
