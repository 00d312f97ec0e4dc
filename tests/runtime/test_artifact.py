"""Writing, opening and distrusting artifacts; packing weights."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dsc
from dsc.errors import ArtifactError, CheckpointError, DscError
from dsc.ir.formats import Format
from dsc.ir.limits import Limits
from dsc.ir.parser import parse_graph, parse_operands, parse_program
from dsc.ir.program import Program
from dsc.ir.segments import Segment, steps
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, Source, WeightExpr, apply, evaluate, leaf
from dsc.runtime import artifact
from dsc.runtime import contents as runtime_contents
from dsc.runtime.contents import contents
from dsc.runtime.emission import Emission, check_unchanged
from dsc.runtime.nodes import draft_nodes, whole_entry
from dsc.runtime.packing import layout, pack
from dsc.runtime.plan import FORMAT, WEIGHT, Buffer, EntryPlan, Launch, Plan, Port, Ref
from dsc.runtime.tuned import Tuned
from tests.runtime.test_session import small_lm

TEXT = """program "p" {stage=CANONICAL}
symbols {N=[1,8]}
weights {
  @odd : f32[3] = source "odd" : f32[3]
  @both : bf16[4,2] = concat(source "a" : bf16[2,2], source "b" : bf16[2,2]) {axis=0}
  @scalar : i64[] = source "scalar" : i64[]
}
graph main(%x: f32[N,3]) {
  %y = mul %x, @odd : f32[N,3]
  return %y
}
"""
TENSORS = {
    "odd": torch.tensor([1.0, 2.0, 3.0]),
    "a": torch.ones(2, 2, dtype=torch.bfloat16),
    "b": torch.zeros(2, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
}


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def program() -> Program:
    return parse_program(TEXT, DictSource(TENSORS))


def write(
    out: Path, emission: Emission | None = None, force: bool = False, with_weights: bool = True
) -> Path:
    emission = emission or Emission({"x/code.txt": b"hello"})
    return artifact.write(
        out, program(), emission, backend="reference", targets=("cpu",), report={"passes": []},
        force=force, with_weights=with_weights,
    )  # fmt: skip


def test_packed_weights_read_back_and_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    written = pack(program(), path)
    header, places = layout(program())
    data = path.read_bytes()
    assert written.facts["bytes"] == len(data)
    digests = {k: hashlib.sha256(data[at : at + n]) for k, (at, n) in places.items()}
    assert written.facts["tensors"] == {k: found.hexdigest() for k, found in digests.items()}
    whole = hashlib.sha256(header + b"".join(digests[k].digest() for k in sorted(digests)))
    assert written.facts["sha256"] == whole.hexdigest()
    assert all(offset % 64 == 0 for offset, _ in places.values())
    found = load_file(path)
    assert torch.equal(found["odd"], TENSORS["odd"])
    assert torch.equal(found["both"], torch.cat([TENSORS["a"], TENSORS["b"]]))
    assert found["scalar"].item() == 7


def test_offsets_are_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    pack(program(), path)
    offset, size = layout(program())[1]["odd"]
    raw = path.read_bytes()[offset : offset + size]
    assert raw == TENSORS["odd"].numpy().tobytes()


def test_a_weight_that_has_the_name_of_anothers_scales_is_refused() -> None:
    stored = TensorType(DType.f8e4m3, (4, 5), Format((2, 3), DType.f32))

    def named(name: str) -> Program:
        return replace(
            program(), weights={"w": leaf("w", stored), name: leaf(name, stored.parts[1][1])}
        )

    assert list(layout(named("w.scales"))[1]) == ["w", "w.scale", "w.scales"]
    with pytest.raises(CheckpointError, match="called as a part of another"):
        layout(named("w.scale"))


def test_a_plan_has_a_buffer_for_each_tensor_that_is_packed() -> None:
    text = """graph main(%x: f32[2,5], @w: f8e4m3{2x*,f32}[4,5], @v: f32[3,5]) {
      %y = linear %x, @w
      %z = linear %x, @v
      return %y, %z
    }"""
    stored = parse_program(text)
    (graph,) = stored.entries.values()
    for draft in (draft_nodes(graph).buffers, whole_entry(graph, {}, "all", "it").buffers):
        sizes = {b.name: b.size for b in draft if b.region == WEIGHT}
        assert sizes == {name: size for name, (_, size) in layout(stored)[1].items()}
        assert sizes == {"w": 20, "w.scale": 8, "v": 60}


@pytest.mark.parametrize("text", ["f8e4m3{1x3,f32}[B,9,5]", "f8e4m3{*x*,bf16}[2,5]"])
def test_a_port_keeps_the_format_of_its_type(text: str) -> None:
    ((t, _),), _ = parse_operands(text)
    port = Port("cache", t, 0)
    plan = Plan({"main": EntryPlan((port,), (port,), (), (), 0, 0)})
    assert Plan.from_json(plan.to_json()) == plan


def test_an_artifact_reads_back(tmp_path: Path) -> None:
    opened = artifact.read(write(tmp_path / "out"))
    assert opened.backend == "reference"
    assert opened.program.entries == program().entries
    value = opened.program.source.load("both")
    assert torch.equal(value, torch.cat([TENSORS["a"], TENSORS["b"]]))
    assert artifact.check_hashes(tmp_path / "out") == len(opened.manifest["files"])


@pytest.mark.parametrize(("most", "times"), [(11, 2), (12, 2), (19, 1), (27, 1), (28, 1), (36, 0)])
def test_memory_of_the_checkpoint_is_given_back_beyond_so_many_bytes(
    most: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of 12, 8, 8 and 8 bytes."""
    monkeypatch.setattr(runtime_contents, "RELEASE_BYTES", most)
    given = program()
    released: list[bool] = []
    monkeypatch.setattr(given.source, "release", lambda: released.append(True))
    for _ in contents(given.weights.items(), given.source):
        pass
    assert len(released) == times


def test_what_is_read_counts_and_not_what_is_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of 4 bytes for 60 bytes."""
    lent, released = DictSource({"x": torch.ones(3, 5)}), []
    monkeypatch.setattr(lent, "release", lambda: released.append(True))
    x = Source("x", lent.types["x"])
    made = apply("block_scales", x, codes=DType.f8e4m3, block=(3, 5), dtype=DType.f32)
    for most, expected in ((60, 0), (59, 1)):
        monkeypatch.setattr(runtime_contents, "RELEASE_BYTES", most)
        assert [len(data) for _, data in contents([("x", made)], lent)] == [4]
        assert len(released) == expected


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_bytes_are_the_same_however_many_threads_make_them(workers: int) -> None:
    """Codes, scales and what is turned, in blocks of a few rows; torch's threads stay as many."""
    source = DictSource({k: torch.randn(96, 64) for k in "abc"})
    a, b, c = (Source(k, source.types[k]) for k in "abc")
    how = {"codes": DType.i4, "block": (1, 32)}
    both = apply("concat", a, b, axis=0)
    scales = apply("block_scales", both, **how, dtype=DType.f16)
    codes = apply("tiled", apply("block_codes", both, scales, **how), tile=16, width=4, step=16)
    turned = apply("cast", apply("permute", c, dims=(1, 0)), dtype=DType.bf16)
    stored: list[tuple[str, WeightExpr]] = [("codes", codes), ("scales", scales)]
    stored = [*stored, ("turned", turned), ("c", c)] * 3
    before = torch.get_num_threads()
    found = [(name, bytes(data)) for name, data in contents(stored, source, workers)]
    assert torch.get_num_threads() == before
    expected = [evaluate(expr, source) for _, expr in stored]
    for (name, data), x in zip(found, expected, strict=True):
        assert data == x.contiguous().view(torch.uint8).numpy().tobytes(), name


def test_what_a_thread_meets_is_told_with_its_weight_and_ends_the_others() -> None:
    source = DictSource({"a": torch.ones(8, 32), "b": torch.full((8, 32), torch.nan)})

    def scales(key: str) -> WeightExpr:
        x = Source(key, source.types[key])
        return apply("block_scales", x, codes=DType.i8, block=(1, 32), dtype=DType.f16)

    more = [("more", scales("a"))] * 9
    parts = contents([("one", scales("a")), ("two", scales("b")), *more], source)
    assert next(parts)[0] == "one"
    with pytest.raises(CheckpointError, match="NaN or infinity") as refused:
        list(parts)
    assert refused.value.where == "two"
    assert not [t for t in threading.enumerate() if t.name.startswith("dsc-pack")]


def test_packing_tells_of_each_block_whose_it_is_and_how_much_is_done(
    tmp_path: Path,
) -> None:
    told: list[tuple[str, int, int]] = []
    pack(program(), tmp_path / "w", lambda *step: told.append(step))
    places = layout(program())[1]
    at, _ = places["scalar"]
    assert told == [
        ("weights: odd", 0, 36), ("weights: both", 12, 36), ("weights: both", 20, 36),
        ("weights: scalar", 28, 36), ("weights", 36, 36),
    ]  # fmt: skip
    assert (tmp_path / "w").stat().st_size == at + 64


def test_weights_that_give_other_bytes_than_declared_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gives(value: Any) -> None:
        monkeypatch.setattr(runtime_contents, "cuts", lambda expr, _: iter([lambda: value]))

    gives(np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match=r"8 bytes for f32\[3\]") as refused:
        pack(program(), tmp_path / "w")
    assert refused.value.where == "odd"
    gives(np.zeros(3))
    with pytest.raises(CheckpointError, match=r"a weight of float64 for f32\[3\]"):
        pack(program(), tmp_path / "w")


def test_finish_is_told_where_weights_lie(tmp_path: Path) -> None:
    told: dict[str, Any] = {}

    def finish(places: Any) -> dict[str, bytes]:
        told.update(places)
        return {"late.txt": b"late"}

    write(tmp_path / "out", Emission({}, finish=finish))
    places = layout(program())[1]
    assert told == {name: ("model.safetensors", *place) for name, place in places.items()}
    assert (tmp_path / "out" / "late.txt").read_bytes() == b"late"


def test_without_weights_finish_is_told_where_they_would_lie(tmp_path: Path) -> None:
    emission = Emission({}, finish=lambda places: {"late.txt": repr(places).encode()})
    out, whole = (write(tmp_path / str(x), emission, with_weights=x) for x in (False, True))
    assert (out / "late.txt").read_text() == (whole / "late.txt").read_text()
    manifest = json.loads((out / "dsc.json").read_text())
    assert manifest["weights"] is None
    assert not (out / "weights").exists()
    assert not artifact.read(out).program.has_weights


def test_a_program_that_has_no_weights_is_whole_without_them(tmp_path: Path) -> None:
    """And has all that people run."""
    bare = parse_program('program "p" {stage=CANONICAL} graph main(%x: f32[4]) { return %x }')
    artifact.write(
        tmp_path / "out", bare, Emission({}, runner="class Model: ..."), backend="reference",
        targets=("cpu",), report={}, with_weights=False,
    )  # fmt: skip
    opened = artifact.read(tmp_path / "out")
    assert opened.manifest["weights"] is None
    assert "run.py" in opened.manifest["files"]
    assert opened.program.has_weights


def test_the_manifest_tells_steps_of_a_causal_model_by_its_last_entry(tmp_path: Path) -> None:
    def steps(program: Program, name: str) -> dict[str, Any]:
        out = artifact.write(
            tmp_path / name, program, Emission({}), backend="reference", targets=("cpu",), report={}
        )
        manifest = json.loads((out / "dsc.json").read_text())
        return {key: manifest.get(key) for key in ("limits", "guards", "states", "checks")}

    whole = small_lm().limited(Limits(2, 30, 8))
    (graph,) = whole.entries.values()
    entries = {"short": graph.with_nodes(graph.nodes[:0]), "step": graph}
    found = steps(whole, "one")
    assert found["limits"] == {"max_batch": 2, "max_context": 30, "prefill_chunk": 8}
    assert [check[0] for check in found["checks"]] == [
        "input_ids", "positions", "lengths", "logits_at",
    ]  # fmt: skip
    assert steps(replace(whole, entries=entries), "two")["checks"] == found["checks"]
    none: dict[str, Any] = {"limits": {}, "guards": None, "states": None, "checks": None}
    assert steps(program(), "plain") == none


def test_a_folder_of_another_artifact_is_noticed(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    manifest = artifact.read(out).manifest
    check_unchanged(out, manifest)
    check_unchanged(out, {**manifest, "name": "told otherwise"})
    write(out, Emission({"x/code.txt": b"other"}), force=True)
    for damage in (None, b"no json"):
        if damage is not None:
            (out / "dsc.json").write_bytes(damage)
        with pytest.raises(ArtifactError, match="was replaced after it was opened"):
            check_unchanged(out, manifest)
    (out / "dsc.json").unlink()
    with pytest.raises(ArtifactError, match="was replaced"):
        check_unchanged(out, manifest)


def test_a_manifest_is_read_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out")
    size = (out / "dsc.json").stat().st_size
    monkeypatch.setattr(artifact, "MAX_MANIFEST", size)
    artifact.read(out)
    monkeypatch.setattr(artifact, "MAX_MANIFEST", size - 1)
    with pytest.raises(ArtifactError, match=f"the manifest is larger than {size - 1} bytes"):
        artifact.read(out)


def test_code_needs_trust_where_nothing_can_be_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes are checked without it: nothing runs."""

    def broken() -> Path:
        raise PermissionError("no home")

    plain, code = (
        write(tmp_path / name, Emission({name: b"..."})) for name in ("plain.txt", "code.so")
    )
    assert artifact.loads_untrusted(plain)
    assert artifact.loads_untrusted(code)
    monkeypatch.setattr(artifact, "state_folder", broken)
    later = write(tmp_path / "later", Emission({"code.so": b"..."}))
    assert [*map(artifact.loads_untrusted, (plain, code, later))] == [True, False, False]
    for folder in (code, later):
        assert artifact.check_hashes(folder) == 4
        with pytest.raises(ArtifactError, match="not built by this user"):
            artifact.read(folder)


def test_nothing_is_written_over_without_force(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    before = (out / "dsc.json").read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        write(out)
    assert (out / "dsc.json").read_bytes() == before
    write(out, Emission({"other.txt": b"1"}), force=True)
    assert (out / "other.txt").exists()
    assert not (out / "x").exists()


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path: Path) -> None:
    """Who made it wants the folder elsewhere, on a disk that is not there."""
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="leads nowhere"):
        write(out)
    assert out.is_symlink()


def test_force_replaces_artifacts_only(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="is no artifact"):
        write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="leads outside"):
        write(tmp_path / "out", Emission({"../evil.txt": b""}))
    assert [p.name for p in tmp_path.iterdir() if p.name != "state"] == []


@pytest.mark.parametrize("name", ["x/code.txt", "program.dsc", "report.json"])
def test_a_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    out = write(tmp_path / "out")
    data = bytearray((out / name).read_bytes())
    data[0] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="hash differs"):
        artifact.read(out)


@pytest.mark.parametrize("what", ["the header", "odd", "both", "the padding"])
def test_a_changed_byte_of_the_weights_is_found_by_hashes_and_named(
    tmp_path: Path, what: str
) -> None:
    out = write(tmp_path / "out")
    path = out / "weights" / "model.safetensors"
    data = bytearray(path.read_bytes())
    others = {"the header": data.index(b"pt"), "the padding": len(data) - 1}
    place = others[what] if what in others else layout(program())[1][what][0]
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"the hash of {what} differs"):
        artifact.check_hashes(out)


def test_a_shortened_file_is_found(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    path = out / "weights" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes"):
        artifact.read(out)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.clear(),
        lambda m: m.update(format=99),
        lambda m: m.update(files=[]),
        lambda m: m.update(targets=[]),
        lambda m: m.pop("limits"),
        lambda m: m.update(limits={"max_batch": "many"}),
        lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"].update({"gone.txt": {"bytes": 1, "sha256": ""}}),
    ],
)
def test_a_bad_manifest_is_one_clear_error(tmp_path: Path, change: Any) -> None:
    out = write(tmp_path / "out")
    manifest = json.loads((out / "dsc.json").read_text())
    change(manifest)
    (out / "dsc.json").write_bytes(artifact.sealed(manifest))
    with pytest.raises(ArtifactError):
        artifact.read(out)


def test_a_manifest_that_was_changed_is_told(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    manifest = json.loads((out / "dsc.json").read_text())
    for key in manifest:
        changed = {**manifest, key: -7}
        (out / "dsc.json").write_text(json.dumps(changed, indent=1, sort_keys=True))
        with pytest.raises(ArtifactError, match=r"is not what was compiled|format -7"):
            artifact.read(out)


def test_garbage_manifests_are_errors_of_ours(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    for garbage in (b"", b"\xff\xfe", b"[" * 5000, b"null", b'{"format": 1}'):
        (out / "dsc.json").write_bytes(garbage)
        with pytest.raises(DscError):
            artifact.read(out)


@pytest.mark.parametrize("name", ["tvm/kernels.so", "triton/kernels/gemm.py", "triton/run.py"])
def test_foreign_code_needs_trust(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", Emission({name: b"whatever it does"}))
    artifact.read(out)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(ArtifactError, match="not built by this user"):
        artifact.read(out)
    artifact.read(out, trust=True)


def test_the_script_for_people_needs_no_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", Emission({}, runner="class Model: ..."))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert "run.py" in artifact.read(out).manifest["files"]


def test_without_weights_there_is_nothing_for_people_to_run(tmp_path: Path) -> None:
    out = write(tmp_path / "out", Emission({}, runner="class Model: ..."), with_weights=False)
    assert not (out / "run.py").exists()


def test_new_files_stand_in_place_of_old_ones_and_all_else_stays(tmp_path: Path) -> None:
    old = Emission({"x/code.txt": b"hello", "y/gone.so": b"code", "y/z/more.txt": b"1"})
    out = write(tmp_path / "out", old)
    (out / "mine").symlink_to("nowhere")
    weights = (out / "weights/model.safetensors").stat().st_ino
    os.link(out / "x/code.txt", tmp_path / "before")
    change = Tuned({}, {"x/code.txt": b"other", "new/a.so": b"b"}, ("y/",), {"cpu": {"tuned": 1}})
    artifact.rewrite(artifact.read(out), change)
    found = artifact.read(out)
    assert artifact.check_hashes(out) == len(found.manifest["files"])
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"dsc.json"}
    assert names == {*found.manifest["files"]}
    assert {"new/a.so", "x/code.txt"} <= names
    assert not (out / "y").exists()
    assert (out / "x/code.txt").read_bytes() == b"other"
    assert (tmp_path / "before").read_bytes() == b"hello", "the old one is not written to"
    assert (out / "weights/model.safetensors").stat().st_ino == weights
    assert (out / "mine").is_symlink()
    assert found.manifest["meta"]["targets"] == {"cpu": {"tuned": 1}}


def test_new_files_make_no_stranger_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", Emission({"a.so": b"code"}))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    artifact.rewrite(artifact.read(out, trust=True), Tuned({}, {"b.so": b"more"}))
    assert artifact.loads_untrusted(out) is False
    with pytest.raises(ArtifactError, match="not built by this user"):
        artifact.read(out)


def test_a_symlink_in_the_artifact_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    secret = tmp_path / "secret"
    secret.write_bytes((out / "report.json").read_bytes())
    (out / "report.json").unlink()
    os.symlink(secret, out / "report.json")
    with pytest.raises(ArtifactError, match="leads outside"):
        artifact.read(out)


def test_plan_json_round_trips() -> None:
    t = program().entries["main"].inputs[0].type
    rows = t.shape[0]
    refs = (Ref(0, "r", t.nbytes), Ref(1, "s", 4, 4 * rows - 4))
    launch = Launch(
        "mul_f32", (*refs, rows, rows * rows + 1), (rows // 2, 1), "copy", (0,), "model.norm",
        "mul", "y",
    )  # fmt: skip
    buffers = (Buffer("input", "x", t.nbytes), Buffer("arena", "", t.nbytes, 64))
    entry = EntryPlan((Port("x", t, 0),), (Port("y", t, 0),), buffers, (launch,), 128, 64, "torch")
    plan = Plan({"main": entry}, {"a": 1})
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.of(program().entries["main"]) == [entry]
    with pytest.raises(ArtifactError, match="damaged"):
        Plan.from_json(b'{"format": %d}' % FORMAT)


def test_an_entry_has_the_plans_of_its_own_segments() -> None:
    """And not those of an entry whose name begins alike."""
    graphs = [
        parse_graph(
            f"graph {name}(%x: f32[4]) {{ %a = neg %x\n %b = all_reduce %a {{ranks=2}}\n"
            " %c = neg %b\n return %c }"
        )
        for name in ("draft", "draft_decode")
    ]
    names = [s.graph.name for graph in graphs for s in steps(graph) if isinstance(s, Segment)]
    plans = {n: EntryPlan((), (), (), (), i, 0) for i, n in enumerate(names)}
    for number, graph in enumerate(graphs):
        assert [p.arena_bytes for p in Plan(plans).of(graph)] == [2 * number, 2 * number + 1]


def test_what_an_older_dsc_wrote_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """One version for the manifest and the plan."""
    out = dsc.compile(small_lm(), backend="null", max_context=32).save(tmp_path / "out")
    for name in ("plan.json", "dsc.json"):
        older = json.loads((out / name).read_text()) | {"format": 1}
        (out / name).write_text(json.dumps(older))
        with pytest.raises(ArtifactError, match=f"format 1, this dsc reads {FORMAT}") as refused:
            Plan.from_json((out / name).read_bytes()) if name == "plan.json" else artifact.read(out)
        assert refused.value.hint == "compile it again with this version"


@pytest.mark.parametrize("damage", [f'{{"format": {FORMAT}, "meta": {"[" * 90000}', "[" * 90000])
def test_a_plan_that_nests_without_end_is_damaged(damage: str) -> None:
    with pytest.raises(ArtifactError, match=r"plan\.json is damaged"):
        Plan.from_json(damage.encode())
