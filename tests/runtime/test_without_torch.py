"""What runs a compiled model imports neither torch nor a compiler, and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import dsc
from dsc.frontends.folder import TOKENIZER
from tests.runtime.test_session import small_lm

HEAVY = ("torch", "transformers", "triton", "tvm", "tvm_ffi")
TALK = """
def talk(session, array):
    rows = [session.prefill(array([[1, 2, 3], [4, 5, 6]])), session.decode(array([7, 8]))]
    kept = session.snapshot(0)
    session.decode({0: 1, 1: 2})
    session.restore(kept)
    session.truncate(1, 3)
    rows.append(session.decode(array([3, 4])))
    session.remove(0)
    third = session.add(array([2, 2]))
    rows += [session.logits(third), session.decode(array([1, 1]))]
    return [*rows, session.prefill(array([[5, 6], [7, 8]]), all_logits=True)]
"""
"""Logits of two sequences, by every verb of a session; ids are what `array` makes of lists."""
LOADED = f"""
import json, sys
import numpy as np
import dsc
from dsc.generation import generate
{TALK}
model = dsc.load(sys.argv[1], trust=True)
rows = talk(model.session(), np.array)
entry = model.program.entries["decode"]
sizes = {{"B": 1, "S": 1, "L": 1, "P": 0, "C": 9}}
given = {{
    v.name: np.zeros([sizes.get(str(d), d) for d in v.type.shape], v.type.dtype.numpy)
    for v in entry.inputs
}}
kinds = [type(x).__name__ for x in model.run(given, "decode").values()]
kinds.append(type(model.session().prefill([[1, 2]])).__name__)
texts = list(generate(model.session(), [1, 2, 3], 4))
heavy = [name for name in {HEAVY!r} if name in sys.modules]
import torch
again = talk(model.session(), torch.tensor)
same = all(torch.equal(torch.from_numpy(a), b) for a, b in zip(rows, again, strict=True))
print(json.dumps([heavy, sorted(set(kinds)), texts, same, [row.tolist() for row in rows]]))
"""
SAID = f"""
import sys
from dsc.cli import main
try:
    main()
finally:
    print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture(scope="module", params=["tvm", "onnxruntime"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of nine words."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    model = dsc.compile(small_lm(), backend=request.param, max_batch=2, max_context=32)
    model = replace(model, _files={TOKENIZER: words.to_str().encode()})
    return model.save(tmp_path_factory.mktemp("small") / "artifact")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_loading_and_generating_import_nothing_heavy_and_torch_may_come_later(
    artifact: Path,
) -> None:
    done = run(LOADED, str(artifact))
    assert done.returncode == 0, done.stderr
    heavy, kinds, texts, same, rows = json.loads(done.stdout)
    assert heavy == []
    assert kinds == ["ndarray"]
    assert len(texts) == 4
    assert same, "tensors give tensors of the same bits"
    here: dict[str, Any] = {}
    exec(TALK, here)
    wanted = here["talk"](dsc.load(artifact).session(), torch.tensor)
    assert all(isinstance(row, torch.Tensor) for row in wanted)
    for row, expected in zip(rows, wanted, strict=True):
        np.testing.assert_array_equal(np.float32(row), expected.numpy())


def test_the_command_line_generates_without_torch(artifact: Path) -> None:
    done = run(SAID, "generate", str(artifact), "--prompt", "w1 w2", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()
    assert not set(done.stderr.split()) & set(HEAVY), done.stderr
