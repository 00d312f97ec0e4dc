"""The bench beside peers: its limit, its turns, its report, its command, what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from bench import limit, onnx_peers, plot, table
from bench.__main__ import cells, parse
from bench.engines import ENGINES, PEERS, module_of
from bench.gguf_file import checkpoint, converted, metadata, plain_metadata
from bench.remote import EngineFailed, Remote, missing
from bench.run import Cell, Effort, Result, Runner, measure, paired
from bench.shapes import shape_config, tensors, write_checkpoint
from dsc.ir.formats import pack
from dsc.ir.parser import parse_type
from dsc.runtime.limit import limit_seconds
from dsc.runtime.protocol import Spread, Turn

MOONLIGHT = shape_config("moonlight-6l")
SMALL = {
    **MOONLIGHT, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def total(context: int, batch: int = 1) -> tuple[float, float]:
    work = limit.step_work(MOONLIGHT, batch, 1, context)
    return sum(w.bytes for w in work), sum(w.flops for w in work)


def test_the_limit_of_moonlight_is_known() -> None:
    weights, flops = total(0)
    assert weights == pytest.approx(1.128e9, rel=1e-3)  # 564 M parameters in bf16
    assert total(4096)[0] - weights == 6912 * 4096  # 576 values of each of 6 layers
    assert total(4096)[1] - flops == pytest.approx(0.86e9, rel=0.01)
    assert total(16384)[1] - flops == pytest.approx(3.4e9, rel=0.02)
    prompt = limit.prefill_work(MOONLIGHT, 1, 512, 512)
    assert sum(w.flops for w in prompt) == pytest.approx(518e9, rel=0.01)
    step = limit.step_work(MOONLIGHT, 1, 1, 0)
    assert limit_seconds(step, 41e9, 1e15) == pytest.approx(27.5e-3, rel=0.01)


@pytest.mark.parametrize(
    ("quant", "stored", "head"),
    [
        ("none", "bf16", "bf16"), ("fp8", "f8e4m3{128x128,f32}", "bf16"),
        ("int8", "i8{1x32,f16}", "i8{1x32,f16}"), ("int4", "i4{1x32,f16}", "i8{1x32,f16}"),
    ],
)  # fmt: skip
def test_the_limit_counts_as_many_bytes_as_are_packed(quant: str, stored: str, head: str) -> None:
    numbers = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    for text, is_head in ((stored, False), (head, True)):
        type = parse_type(f"{text}[256,512]")
        parts = pack(numbers, type).parts if type.format else (numbers.bfloat16(),)
        width = limit.stored(quant, is_head).bytes
        assert limit.stored(quant, is_head).coded == text.startswith("i")
        assert width * numbers.numel() == sum(part.nbytes for part in parts)


def test_a_batch_reads_the_experts_that_it_chooses() -> None:
    one, eight = total(0)[0], total(0, 8)[0]
    expert = 3 * 2048 * 1408 * 2
    assert eight - one == pytest.approx(5 * (34.9 - 6) * expert, rel=0.01)


def test_shapes_hold_what_they_say() -> None:
    assert sum(t.bytes for t in tensors(MOONLIGHT)) == pytest.approx(6.28e9, rel=0.01)
    with pytest.raises(SystemExit, match="moonlight"):
        shape_config("sunlight-6l")


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_checkpoint(SMALL, tmp_path / "small")
    (path,) = (tmp_path / "small").glob("*.safetensors")
    found = load_file(path)
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        t.name: t.shape for t in tensors(SMALL)
    }
    embedding = found["model.embed_tokens.weight"].float()
    assert float(embedding.std()) == pytest.approx(0.02, rel=0.1)
    assert float(found["model.norm.weight"].float().mean()) == 1.0
    assert not list(tmp_path.glob("*.partial"))


def test_gguf_tensors_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(SMALL, tmp_path / "small")
    held = checkpoint(tmp_path / "small")
    parts = {p.name: p for p in converted(SMALL, held)}
    for part in parts.values():
        values = part.make()
        assert values.shape == part.shape, part.name
        assert values.dtype == (np.uint16 if part.matrix else np.float32)
    kv_b = held["model.layers.0.self_attn.kv_b_proj.weight"]().reshape(2, 16, 16)
    assert np.array_equal(parts["blk.0.attn_k_b.weight"].make()[1], kv_b[1, :8].T)
    assert np.array_equal(parts["blk.0.attn_v_b.weight"].make()[1], kv_b[1, 8:])
    third = held["model.layers.1.mlp.experts.2.up_proj.weight"]()
    assert np.array_equal(parts["blk.1.ffn_up_exps.weight"].make()[2], third)
    assert sum((2 if p.matrix else 4) * prod(p.shape) for p in parts.values()) >= sum(
        t.bytes for t in tensors(SMALL)
    )
    assert metadata(SMALL)["key_length"] == 16 + 4


PLAIN_SMALL: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_plain_decoder_is_converted_whole(kind: str, tmp_path: Path) -> None:
    config = PLAIN_SMALL | {"model_type": kind}
    write_checkpoint(config, tmp_path / "small")
    held = checkpoint(tmp_path / "small")
    parts = {p.name: p for p in converted(config, held)}
    assert len(parts) == len(held) + 1, "a tied head stands in the file too"
    for part in parts.values():
        assert part.make().shape == part.shape, part.name
    k, wanted = (
        parts["blk.1.attn_k.weight"].make(),
        held["model.layers.1.self_attn.k_proj.weight"](),
    )
    if kind == "llama":  # pairs (i, i + 4) of a head of 8 side by side
        wanted = wanted.reshape(2, 2, 4, 32).swapaxes(1, 2).reshape(16, 32)
    assert np.array_equal(k, wanted)
    assert ("blk.0.attn_q.bias" in parts) == (kind == "qwen2")
    assert plain_metadata(config)["key_length"] == 8


def test_the_limit_of_a_plain_decoder_is_its_weights_and_rows() -> None:
    config = shape_config("qwen2-1.5b")
    weights = sum(t.bytes for t in tensors(config) if len(t.shape) > 1)
    one, far = (sum(w.bytes for w in limit.step_work(config, 1, 1, n)) for n in (0, 4096))
    row = 2 * 28 * 2 * 2 * 128
    assert one == weights + row
    assert far - one == 4096 * row


class FakeRemote:
    """An engine whose steps take a known time, on a machine that halves its speed at times."""

    def __init__(self, engine: str, seconds: float) -> None:
        self.engine, self.seconds, self.asked = engine, seconds, cast(list[str], [])

    def call(self, name: str, **arguments: Any) -> Any:
        self.asked.append(name)
        return [self.seconds] * arguments["count"] if name == "steps" else None


def speeds(*bandwidths: float) -> Iterator[dict[str, float]]:
    return iter([{"bandwidth": b * 1e9, "matrix": 1e12, "coded": 1e12} for b in bandwidths])


def test_engines_take_turns_between_probes() -> None:
    ours, theirs = FakeRemote("dsc", 0.05), FakeRemote("peer", 0.1)
    cell, effort = Cell("decode", 128, 1), Effort(rounds=2, tokens=20, seconds=0.5)
    machine = speeds(40, 40, 41, 41, 20)
    runners = [Runner(cast(Remote, r), cell, effort) for r in (ours, theirs)]
    mine, other = measure(runners, lambda: next(machine), MOONLIGHT, settle=0)
    assert ours.asked == ["start", "steps", "steps", "steps"]
    assert [r.count for r in runners] == [10, 5]  # as many as fit into half a second
    assert (mine.rounds, mine.dropped, other.dropped) == (2, 1, 0)
    assert mine.ratio is None
    assert other.ratio == Spread(2, 2, 2, 1)  # the second round's probes disagree
    assert mine.of_limit is not None
    assert mine.of_limit.median == pytest.approx(1.129e9 / 40e9 / 0.05, rel=0.01)
    assert mine.tokens_per_second == pytest.approx(20)


def test_no_steady_round_is_said() -> None:
    remote, machine = FakeRemote("dsc", 0.05), speeds(40, 20, 40)
    runner = Runner(cast(Remote, remote), Cell("prefill", 512, 1), Effort(rounds=2))
    turn = {"bandwidth": 1.0, "matrix": 1.0, "coded": 1.0}
    slow = {"bandwidth": 1.0, "matrix": 0.5, "coded": 1.0}
    assert paired([Turn(turn, (1.0,), turn)], [Turn(turn, (2.0,), slow)], "matrix") is None
    remote.call = lambda name, **_: 0.5  # type: ignore[method-assign]
    (result,) = measure([runner], lambda: next(machine), MOONLIGHT, settle=0)
    assert result.seconds is not None  # a prompt is bound by the cores, which were steady


RESULTS = [
    Result(Cell("decode", c, 1), e, Spread(s, s, s, 9), Spread(0.5, 0.4, 0.6, 9), rounds=15)
    for e, s in (("dsc", 0.02), ("llama.cpp", 0.03))
    for c in (128, 1024)
]
FACTS = {
    "shape": "moonlight-6l", "threads": 2, "machine": "a machine", "commit": "abc",
    "probe": "bf16 vectors, int8 vectors",
    "engines": {"dsc": {"load_s": 1.5, "compile_s": 30.0, "rss": 7e9, "units": "znver4, tiles"}},
    "skipped": {"transformers": "not installed: transformers"},
}  # fmt: skip


def test_the_report_says_what_was_measured_and_what_was_skipped() -> None:
    failed = Result(Cell("decode", 16384, 8), "dsc", why="out of memory")
    text = table.markdown(FACTS, [*RESULTS, failed])
    assert "| decode 128, batch 1 | dsc | 50.0 | 20.00 (20.00-20.00) | 0.50 (0.40-0.60) |" in text
    assert "| decode 16384, batch 8 | dsc | out of memory |" in text
    assert "| dsc | 30.0 | 1.5 | 7.00 | znver4, tiles |" in text
    assert "Products are by bf16 vectors, int8 vectors." in text
    assert "wrong\n" not in text
    assert "- transformers: not installed" in text
    rows = json.loads(json.dumps(table.as_json(FACTS, RESULTS)))["results"]
    assert rows[0]["tokens_per_second"] == 50
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| d")}) == 2


def test_a_limit_that_is_passed_is_told() -> None:
    """Steps of a tenth less than a read of their bytes takes; an equal time is no fault."""
    found = []
    for share in (1.0, 1.1):
        remote, machine = FakeRemote("dsc", 1.128e9 / 40e9 / share), speeds(40, 40, 40)
        cell = Cell("decode", 1, 1)
        runner = Runner(cast(Remote, remote), cell, Effort(rounds=2))
        found += measure([runner], partial(next, machine), MOONLIGHT, settle=0)
    assert [bool(each.passed) for each in found] == [False, True]
    text = table.markdown(FACTS, found)
    assert "## The probes are wrong\n\n- decode 1, batch 1, dsc: steps are faster" in text
    assert text.count("(!) |") == 1
    assert json.loads(json.dumps(table.as_json(FACTS, found)))["results"][1]["passed"]


def test_the_probe_reads_as_many_bytes_as_a_step() -> None:
    decode = Cell("decode", 128, 1, "int8")
    step = sum(work.bytes for work in decode.work(MOONLIGHT, 0))
    assert decode.read_bytes(MOONLIGHT) == pytest.approx(step)
    prompt = Cell("prefill", 1024, 1, "int8")
    twice = sum(w.bytes for w in prompt.work(MOONLIGHT, 0))
    assert prompt.read_bytes(MOONLIGHT) == pytest.approx(twice / 2, rel=0.01)


def test_the_picture_has_a_line_an_engine() -> None:
    from xml.etree import ElementTree

    picture = ElementTree.fromstring(plot.decode_svg(RESULTS, 1))
    names = {e.text for e in picture.iter() if e.tag.endswith("text")}
    assert {"dsc", "llama.cpp", "128", "1024"} <= names
    assert plot.decode_svg(RESULTS, 8) == ""


def test_the_command() -> None:
    asked = parse([])
    assert (asked.shape, asked.peers, asked.effort.rounds) == ("moonlight-6l", list(PEERS), 15)
    quick = parse(["--quick"])
    assert (quick.peers, quick.contexts, quick.batches) == ([], [128, 1024], [1])
    some = parse(["--peers", "llama.cpp", "--contexts", "64,128", "--rounds", "4"])
    assert (some.peers, some.contexts, some.effort.rounds) == (["llama.cpp"], [64, 128], 4)
    assert [c.name for c in cells([128], [1, 8])] == [
        "prefill 512, batch 1", "decode 128, batch 1", "decode 128, batch 8",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        parse(["--peers", "abacus"])


def test_a_peer_that_is_missing_is_named() -> None:
    assert "llama_cpp" in missing("llama.cpp") or missing("llama.cpp") == ""
    assert missing("transformers") == ""
    assert all(name in module_of(name).NEEDS for name in ENGINES)


def test_a_worker_answers_and_tells_its_errors() -> None:
    with Remote("transformers") as remote:
        assert remote.call("rss") > 1e6
        with pytest.raises(EngineFailed, match="NoneType"):
            remote.call("steps", count=1)
        remote.process.kill()
        remote.process.wait()
        with pytest.raises(EngineFailed, match="ended"):
            remote.call("rss")


def test_a_ratio_out_of_reach_holds_where_19_parts_of_20_are_the_kernels() -> None:
    for ratio, share, wanted in ((0.71, 0.1, True), (0.69, 0.96, True), (0.69, 0.94, False)):
        cell = {"ratio": ratio, "least": 0.7, "kernels": {"share": share}}
        assert onnx_peers.holds({"int4": {"128": cell}}) is wanted
