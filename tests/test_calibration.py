"""What quantising costs each product: figures against runs of programs made by the passes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

import dsc
from dsc import backends, pipeline
from dsc.backends.base import Capabilities
from dsc.calibration.asked import Asked
from dsc.calibration.calibrate import calibrate
from dsc.calibration.costs import bits, choose
from dsc.calibration.drawing import draw
from dsc.calibration.measure import Batch, Cost, Errors, Rows, Trial
from dsc.calibration.products import Product, called, find_products
from dsc.calibration.texts import text_ids, windows
from dsc.cli.report_tables import print_report
from dsc.errors import UsageError
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.weights import random_source, source_types
from dsc.models.configs import TINY_CHECKPOINT
from dsc.passes.quantize_weights import QuantizeWeights
from dsc.pipeline import PipelineOptions
from dsc.rewrite.base import PassReport
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.passes.test_quantize_weights import model
from tests.runtime.test_session import small_lm

IDS = torch.randint(9, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def inputs(seed: int = 0) -> dict[str, Any]:
    """Inputs of the model of the pass's tests: two products, experts, and a head."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(16, (5,), generator=generator),
        "idx": torch.randint(3, (5, 2), generator=generator),
        "w": torch.rand(5, 2, generator=generator),
        "z": torch.randn(5, 7, generator=generator),
    }


def compiled(**options: Any) -> dsc.CompiledModel:
    given: dict[str, Any] = {"backend": "null", "quant": "int4", "calibrate": IDS, **options}
    return dsc.compile(small_lm(), max_batch=2, max_context=32, prefill_chunk=8, **given)


def products_of(program: Program, **options: Any) -> list[Product]:
    return find_products(program, QuantizeWeights(**options).run(program, PassReport()))


# --- which products there are ---------------------------------------------------------------------


def test_weights_that_a_product_reads_together_are_kept_together() -> None:
    program = model()
    found = products_of(program, codes="i4")
    assert [tuple(each.stored) for each in found] == [
        ("a.weight",), ("up", "down"), ("head.weight",)
    ]  # fmt: skip
    _, experts, head = found
    assert (head.codes, head.keep, head.elements) == (("i8",), ("head",), 9 * 64)
    assert head.nbytes == 9 * 64 + 9 * 2 * 2
    assert head.plain_bytes == 9 * 64 * 4
    for product in found:
        keep = product.keep
        rest = products_of(program, codes="i4", keep=keep)
        assert [tuple(x.stored) for x in rest] == [
            tuple(x.stored) for x in found if x is not product
        ]
    assert experts.keep == ("e.0", "d"), "no module holds them all, and a tensor of each does"


SHARED = """program "s" {stage=CANONICAL}
symbols {N=[1,8]}
weights {
  @up : f32[3,8,64] = source "up" : f32[3,8,64]
  @one : f32[3,64,4] = source "one" : f32[3,64,4]
  @two : f32[3,64,4] = source "two" : f32[3,64,4]
}
graph main(%x: f32[N,64], %idx: i64[N,2], %w: f32[N,2]) {
  %y = experts %x, %idx, %w, @up, @one
  %z = experts %y, %idx, %w, @up, @two
  return %z
}
"""


def test_products_that_share_a_weight_are_one() -> None:
    program = parse_program(SHARED)
    program = parse_program(SHARED, random_source(source_types(program.weights.values())))
    (product,) = products_of(program)
    assert set(product.stored) == {"up", "one", "two"}
    given = {"x": torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), **inputs()}
    batch = Batch("main", {name: given[name] for name in ("x", "idx", "w")})
    trial = Trial(program, [product])
    (cost,) = trial.measure([batch], lambda *_: None)
    quantised = QuantizeWeights().run(program, PassReport())
    runs = [Interpreter(x).run("main", batch.inputs) for x in (program, quantised)]
    errors = Errors()
    errors.add(*(next(iter(each.values())) for each in runs))
    assert cost.harm.value == pytest.approx(errors.share, rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["m.x.0.up.weight", "m.x.1.up.weight"], "m.x"),
        (["m.x.0.up", "m.y.up", "m.z.up", "m.w.up"], "m.{x,y,z,…}"),
        (["up", "down"], "{up,down}"),
    ],
)
def test_a_product_is_called_by_its_modules(keys: list[str], name: str) -> None:
    assert called(keys) == name


# --- what each costs ------------------------------------------------------------------------------


def as_passes_make_it(program: Program, some: list[Product], activations: str) -> Program:
    """The program with some products in codes, their rows too, by passes alone."""
    names = [each.name for each in some]
    others = [p for x in products_of(program, codes="i4") if x.name not in names for p in x.keep]
    made = QuantizeWeights(codes="i4", keep=tuple(others)).run(program, PassReport())
    made = pipeline.make("choose_formats", formats=("i8", "i4")).run(made, PassReport())
    if activations:
        made = pipeline.make("quantize_activations").run(made, PassReport())
    return made


@pytest.mark.parametrize("activations", ["", "i8:32"])
def test_harm_is_that_of_the_program_with_one_product_in_codes(activations: str) -> None:
    program, given = model(), [inputs(1), inputs(2)]
    products = products_of(program, codes="i4")
    batches = [Batch("main", each) for each in given]
    told: list[tuple[int, int]] = []
    trial = Trial(program, products, activations)
    costs = trial.measure(batches, lambda *at: told.append(at))
    assert told[-1] == (8, 8)
    exact = [Interpreter(program).run("main", each) for each in given]
    alone = [([cost.product], cost.harm) for cost in costs]
    for some, harm in (*alone, (products, trial.harm(batches, products))):
        other = Interpreter(as_passes_make_it(program, some, activations))
        errors = Errors()
        for each, before in zip(given, exact, strict=True):
            after = other.run("main", each)
            for name, x in before.items():
                errors.add(x, after[name])
        assert harm.value == pytest.approx(errors.share, rel=1e-6)
        assert harm.value > 0
    assert all(cost.ran for cost in costs)
    assert trial.harm(batches, []).value == 0.0


def test_a_products_own_error_is_that_of_its_result() -> None:
    program = model()
    (cost, *_) = Trial(program, products_of(program)).measure([Batch("main", inputs())], print)
    weights = {n: Interpreter(program).weight(n) for n in ("embed.weight", "a.weight")}
    x = weights["embed.weight"][inputs()["ids"]]
    rounded = Interpreter(QuantizeWeights().run(program, PassReport())).weight("a.weight")
    exact, off = x @ weights["a.weight"].T, x @ (rounded - weights["a.weight"]).T
    assert cost.errors.relative == pytest.approx(float(off.norm() / exact.norm()), rel=1e-4)
    assert cost.rows.largest == float(x.abs().max())


def test_calc_diff_is_deepgemms_and_magnitudes_are_counted_by_powers_of_two() -> None:
    x, y = torch.randn(2, 50, dtype=torch.float64)
    errors = Errors()
    errors.add(x[:20], y[:20])
    errors.add(x[20:], y[20:])
    expected = 1 - 2 * (x * y).sum() / (x * x + y * y).sum()
    assert errors.calc_diff == pytest.approx(float(expected))
    rows = Rows()
    rows.add(torch.tensor([0.0, 0.3, -0.25, 1.0, -1.9]))
    rows.add(torch.tensor([8.0]))
    assert rows.as_dict() == {
        "max": 8.0, "rms": pytest.approx(3.3853, abs=1e-4), "log2": -2,
        "counts": [2, 0, 2, 0, 0, 1],
    }  # fmt: skip


# --- of a language model --------------------------------------------------------------------------


def kl(before: torch.Tensor, after: torch.Tensor) -> float:
    p, q = (x.double().log_softmax(-1) for x in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_harm_is_the_divergence_of_the_next_token_and_what_is_kept_takes_it_away() -> None:
    plenty = compiled(backend="reference", avg_bits=32, seqlen=8, nsamples=3)
    found = plenty.report["quantisation"]
    assert found["tokens"] == 24
    assert {each["kept"] for each in found["operators"]} == {"f32"}
    assert found["left"]["harm"] == 0.0
    assert found["bits_kept"] == 32
    harms = [each["harm"] for each in found["operators"]]
    assert harms == sorted(harms, reverse=True)
    assert sum(each["share"] for each in found["operators"]) == pytest.approx(1)
    rows = torch.from_numpy(windows(IDS, 3, 8))
    plain = compiled(backend="reference", quant="none", calibrate=None)
    exact = [plain.session(max_batch=1).prefill(row, all_logits=True) for row in rows]
    worst = found["operators"][0]
    others = [k for k in found["keep"] if not any(w.startswith(k) for w in worst["weights"])]
    one = compiled(backend="reference", calibrate=None, keep=others)
    after = [one.session(max_batch=1).prefill(row, all_logits=True) for row in rows]
    assert worst["harm"] == pytest.approx(kl(torch.cat(exact), torch.cat(after)), rel=1e-4)
    nll = torch.cat([x[0, :-1].log_softmax(-1) for x in exact])
    loss = -nll.gather(-1, rows[:, 1:].reshape(-1, 1)).mean()
    assert worst["loss_before"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(("backend", "cache"), [("tvm", "contiguous"), ("reference", "paged")])
def test_caches_in_place_and_in_pages_cost_what_grown_ones_do(backend: str, cache: str) -> None:
    def harms(backend: str, cache: str) -> dict[str, float]:
        options = PipelineOptions(quant="int4", cache=cache, activation_bits=16)
        chosen, asked = backends.get(backend), Asked(IDS, nsamples=2)
        found = calibrate(small_lm(), chosen, Target("cpu"), options, asked)
        return {cost.product.name: cost.harm.value for cost in found.costs}

    grown = harms("reference", "contiguous")
    assert len(grown) == 3
    assert harms(backend, cache) == pytest.approx(grown, rel=1e-3)


def test_half_a_bit_is_spent_where_nobody_says_how_many() -> None:
    model = compiled()
    found = model.report["quantisation"]
    assert found["bits"] <= found["bits_kept"] <= found["bits"] + 0.5
    assert found["left"]["harm"] <= found["together"]["harm"]
    notes = "\n".join(model.report["notes"])
    assert "products in int4: KL" in notes
    assert f"{found['bits_kept']:.2f} bits a weight" in notes


def test_what_is_kept_in_8_bits_is_so_in_the_artifact_and_harms_less() -> None:
    model = compiled(backend="reference", avg_bits=16)
    found = model.report["quantisation"]
    kept = {each["operator"]: each["kept"] for each in found["operators"]}
    assert "i8" in kept.values()
    types = model.program.weight_types()
    for each in found["operators"]:
        for name in each["weights"]:
            kind = types[name]
            assert str(kind.dtype) == (each["kept"] or each["codes"][0])
    assert 0 < found["left"]["harm"] < 0.1 * found["together"]["harm"]
    again = compiled(backend="reference", calibrate=None, keep=found["keep"])
    assert again.program.weight_types() == types


def made_up(*figures: tuple[float, int], finer: bool = False) -> list[Cost]:
    """Costs of products by harm and number of weights, 4 bits each (or 8), 16 as they were."""
    costs = []
    for number, (harm, size) in enumerate(figures):
        product = Product(f"p{number}", (f"p{number}",), ("i4",), {}, size, size // 2, size * 2)
        if finer:
            more = replace(product, codes=("i8",), nbytes=size)
            product = replace(product, finer=more)
        cost = Cost(product, ran=True)
        cost.harm.errors.xx, cost.harm.errors.off = 1.0, harm
        costs.append(cost)
    return costs


def test_most_harm_a_byte_is_kept_first_within_the_bits() -> None:
    costs = made_up((0.5, 800), (0.4, 100), (0.0, 10), (0.2, 90))
    assert bits(costs) == 4
    assert choose(costs, 4) == []
    for most, kept in ((5.1, [3]), (5.2, [1]), (13.0, [1, 3]), (16, [0, 1, 3])):
        found = choose(costs, most)
        assert [each.cost for each in found] == [costs[i] for i in kept]
        assert bits(costs, found) <= most
    with pytest.raises(UsageError, match=r"avg_bits is 3\.9, and the codes .* take 4\.00"):
        choose(costs, 3.9)


def test_8_bits_are_spent_before_more() -> None:
    costs = made_up((0.5, 800), (0.4, 100), (0.0, 10), (0.2, 90), finer=True)
    for most, kept in (
        (4.4, {"p1": ["p1:int8"]}),
        (4.8, {"p1": ["p1:int8"], "p3": ["p3:int8"]}),
        (8.0, {"p0": ["p0:int8"], "p1": ["p1:int8"], "p3": ["p3:int8"]}),
        (8.8, {"p0": ["p0:int8"], "p1": ["p1"], "p3": ["p3:int8"]}),
        (16, {"p0": ["p0"], "p1": ["p1"], "p3": ["p3"]}),
    ):
        found = choose(costs, most)
        assert {each.cost.product.name: each.patterns for each in found} == kept
        assert bits(costs, found) <= most


# --- texts ----------------------------------------------------------------------------------------


def test_windows_lie_side_by_side_or_apart_and_never_over_another() -> None:
    for size, count, length in ((100, 4, 20), (100, 9, 20), (81, 4, 20), (7, 4, 20), (20, 1, 20)):
        found = windows(range(size), count, length)
        starts = found[:, 0]
        assert found.shape == (max(1, min(count, size // length)), min(length, size))
        assert (np.diff(starts) >= length).all()
        assert (found == starts[:, None] + np.arange(found.shape[1])).all()
        assert found[-1, -1] == size - 1 or len(found) == 1


def test_a_path_a_text_and_ids_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("In the beginning")
    tokenizer = TINY_CHECKPOINT / "tokenizer.json"
    ids = text_ids("In the beginning", tokenizer)
    assert len(ids) > 2
    for given in (tmp_path / "book.txt", str(tmp_path / "book.txt"), ids, np.asarray(ids)):
        assert text_ids(given, tokenizer) == ids


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"quant": "none"}, "nothing to calibrate"),
        ({"calibrate": None, "avg_bits": 5}, "nothing says what harms most"),
        ({"avg_bits": "5"}, "avg_bits is '5'"),
        ({"avg_bits": 2}, "avg_bits is 2, and the codes"),
        ({"nsamples": 0}, "nsamples is 0"),
        ({"seqlen": 1}, "seqlen is 1"),
        ({"seqlen": 9}, "seqlen is 9, and a step takes 8 tokens"),
        ({"calibrate": "a text"}, "no tokenizer"),
        ({"calibrate": [1, 99]}, "outside of the vocabulary"),
        ({"calibrate": [3]}, "1 tokens are too few"),
        ({"calibrate": {"x": 1}}, "calibrated on a text"),
        ({"calibrate": 1.5}, "ids must be"),
        ({"group_size": 1}, "group_size is 1"),
        ({"activation_bits": 4}, "activation_bits is 4"),
        ({"keep": ["*"]}, "no product has a weight"),
    ],
)
def test_what_cannot_be_asked_is_told(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compiled(**asked)


def test_a_model_whose_logits_are_no_numbers_is_not_ranked() -> None:
    program, asked = small_lm(), Asked(IDS)
    program.source.load("norm")[0] = float("nan")
    with pytest.raises(UsageError, match="no numbers"):
        calibrate(
            program, backends.get("null"), Target("cpu"), PipelineOptions(quant="int8"), asked
        )


def test_several_ranks_keep_what_the_whole_model_found() -> None:
    alone, ranks = compiled(avg_bits=16), compiled(avg_bits=16, ranks=2)
    assert ranks.report["quantisation"] == alone.report["quantisation"]
    kinds = [{str(t.dtype) for t in x.program.weight_types().values()} for x in (alone, ranks)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("given", ["a text", [1, 2], [{"ids": np.zeros(5)}]])
def test_a_program_that_reads_no_text_wants_its_inputs(given: object) -> None:
    with pytest.raises(UsageError, match=r"by name|needs the inputs"):
        dsc.compile(model(), backend="null", quant="int8", calibrate=given)


def test_a_program_that_is_no_language_model_is_calibrated_on_its_inputs() -> None:
    given: Mapping[str, Any] = {name: x.numpy() for name, x in inputs().items()}
    made = dsc.compile(model(), backend="null", quant="int8", calibrate=given)
    found = made.report["quantisation"]
    assert found["measure"] == "squared_error"
    assert {each["operator"] for each in found["operators"]} == {"a", "{e,d}", "odd"}


# --- how it is shown, and the options beside ------------------------------------------------------


def test_calibrating_is_a_phase_with_seconds_of_its_own() -> None:
    start = time.perf_counter()
    seconds = compiled().report["seconds"]
    wall = time.perf_counter() - start
    assert set(seconds) == {"trace", "passes", "emit", "calibrate"}
    assert min(seconds.values()) >= 0
    assert sum(seconds.values()) <= wall + 0.01
    assert set(compiled(calibrate=None).report["seconds"]) == {"trace", "passes", "emit"}


def test_tables_and_drawings_show_every_operator_and_no_markup_of_a_name() -> None:
    found = dict(compiled().report["quantisation"])
    found["operators"] = [
        {**each, "kept": "i8" * (i == 0)} for i, each in enumerate(found["operators"])
    ]
    found["operators"][0]["operator"] = "a<b>&[red]x"
    console = Console(width=200, record=True)
    print_report(console, {"quantisation": found})
    shown = console.export_text()
    tree = ElementTree.fromstring(draw(found))
    texts = [each.text for each in tree.iter() if each.text]
    for each in found["operators"]:
        assert each["operator"] in shown
        assert each["operator"] in texts
    kinds = [each.get("class") for each in tree.iter()]
    assert kinds.count("kept") == 1
    assert kinds.count("bar") == len(found["operators"]) - 1


def test_groups_are_as_wide_as_was_asked_or_as_the_backend_wants_and_experts_divide_by() -> None:
    for inner, asked, wanted in (
        (128, None, 128), (128, 64, 64), (192, None, 64), (192, 128, 128), (14, None, 32),
    ):  # fmt: skip
        options = PipelineOptions(quant="int4", group_size=asked)
        program = canonical_lm(Sizes(hidden=128, expert_inner=inner))
        passes = pipeline.passes_for(program, Capabilities(group=128), options)
        assert [x.group for x in passes if isinstance(x, QuantizeWeights)] == [wanted]


def test_16_bits_of_activations_leave_rows_as_they_are() -> None:
    can = Capabilities(activations=("i8",), formats=("i8",))
    for width, takes in ((8, True), (16, False)):
        asked = PipelineOptions(quant="int8", activation_bits=width, group_size=64)
        names = {each.name: each for each in pipeline.passes_for(small_lm(), can, asked)}
        assert ("quantize_activations" in names) is takes
        assert names["quantize_weights"].text == "quantize_weights{stays=[i8],group=64}"
