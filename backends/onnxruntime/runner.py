"""Run this artifact: python run.py "a prompt". It needs numpy, tokenizers and onnxruntime."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

try:
    import numpy as np
    import onnxruntime
except ImportError as missing:
    sys.exit(f"run.py: {missing}; pip install numpy tokenizers onnxruntime")

from dsc.backends.onnxruntime.external_data import check_external
from dsc.runtime.standalone import Array, Compiled

CACHES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_value = onnxruntime.OrtValue.ortvalue_from_numpy  # over the memory of an array


class Model(Compiled):
    """A model and its cache. Sequences are rows of a batch; they may differ in length."""

    def __init__(self, folder: str | pathlib.Path, threads: int | None = None) -> None:
        """Read the manifest of `folder`. Each ONNX model is opened when first needed."""
        super().__init__(folder)
        needs = self.manifest["needs"]["onnxruntime"]
        versions = (needs.partition(">=")[2], onnxruntime.__version__)
        least, installed = ([int(part) for part in v.split(".")[:2]] for v in versions)
        if installed < least:
            raise ImportError(f"onnxruntime {versions[1]} is too old; pip install '{needs}'")
        self.threads = threads or self.manifest["meta"]["threads"] or 0
        self.sizes = {"P": 0}
        self._sessions: dict[str, Any] = {}
        self._caches: dict[str, Any] = {}

    def run(self, entry: str, sizes: Mapping[str, int], tokens: dict[str, Array]) -> Array:
        """The logits of a step; the caches that come out are those of the next one."""
        rows, longest = sizes["B"], int(tokens["lengths"].max())
        held = next((x.shape()[0] for x in self._caches.values()), rows)
        if longest and held != rows:
            raise ValueError(f"{rows} sequences, the cache holds {held}")
        session = self._session(self.plan["entries"][entry]["launches"][0]["kernel"])
        feeds = {name: _value(x) for name, x in tokens.items()}
        for spec in session.get_inputs():
            if spec.name not in tokens:
                feeds[spec.name] = self._past(spec, rows, longest)
        names = [spec.name for spec in session.get_outputs()]
        results = dict(zip(names, session.run_with_ort_values(names, feeds), strict=True))
        logits: Array = results.pop("logits").numpy()
        self._caches = {name.replace("present", "past", 1): x for name, x in results.items()}
        self.sizes = {"P": next((x.shape()[1] for x in self._caches.values()), 0)}
        return logits

    def _past(self, spec: Any, rows: int, longest: int) -> Any:
        """The cache as an input, cut to `longest` rows: what follows was padding."""
        if longest == 0:
            return _value(np.zeros((rows, 0, spec.shape[2]), CACHES[spec.type]))
        held = self._caches[spec.name]
        if held.shape()[1] == longest:
            return held
        return _value(np.ascontiguousarray(held.numpy()[:, :longest]))

    def _session(self, path: str) -> Any:
        """The session of an ONNX model of the folder."""
        if path not in self._sessions:
            if json.loads((self.folder / "dsc.json").read_text()) != self.manifest:
                raise ValueError(f"{self.folder} was compiled anew; open it again")
            check_external(self.folder, path, self.manifest["files"])
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            prepack = "0" if self.manifest["meta"]["prepack"] else "1"
            options.add_session_config_entry("session.disable_prepacking", prepack)
            options.intra_op_num_threads = self.threads
            self._sessions[path] = onnxruntime.InferenceSession(
                str(self.folder / path), options, providers=self.manifest["meta"]["providers"]
            )
        return self._sessions[path]
