"""Random programs through every pass: what they compute stays, and every pass has its part."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings

from bench.proofs import verified
from dsc import pipeline
from dsc.ir.dims import symbol
from dsc.ir.graph import Graph, GraphBuilder, Node, Weight
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source, random_source
from dsc.passes.absorb_mla import AbsorbMla
from dsc.rewrite.base import PassReport
from tests.ir import spellings as spell
from tests.ir.models import RANGES, models
from tests.passes.test_raise_models import stored
from tests.whole_pipeline import Setting, Tally, check, settings

SAMPLED, ALL = 40, 2000
OPTIONAL = frozenset(
    {"merge_shared_expert", "cut_at_collectives", "raise_registered", "quantize_weights"}
    | {"insert_fp8", "quantize_activations", "pair_gates", "quantize_cache", "spell_out_scatter"}
)
"""Passes that no setting here asks for, or too few do."""
RARE = frozenset({"eliminate_dead_code", "fold_empty"})
"""Passes that one program in thirty gives something to do: a sample may hold none."""


def run(count: int) -> Tally:
    """Check `count` programs; the tally of the passes."""
    tally = Tally()

    @hypothesis_settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)
    @given(models(), settings())
    def through(program: Program, setting: Setting) -> None:
        check(program, setting, tally)

    through()
    return tally


def fires(tally: Tally, share: float, but: frozenset[str] = frozenset()) -> None:
    """Every pass of the pipeline did something in a good share of the programs."""
    for name in pipeline.PASSES.keys() - OPTIONAL - but:
        assert tally.fired[name] >= share * tally.programs, (name, tally.fired)


def test_a_sample_keeps_its_meaning_through_the_pipeline() -> None:
    fires(run(SAMPLED), 0.01, RARE)


@pytest.mark.exhaustive
def test_two_thousand_programs_keep_their_meaning() -> None:
    fires(run(ALL), 0.02)


@pytest.mark.parametrize(("name", "level"), [("v3", 3), ("v2_greedy", 1)])
def test_every_pass_of_a_real_trace_is_verified(name: str, level: int) -> None:
    done = verified(stored(name), "reference", level)
    assert not done["unverified"]
    assert done["forms"] == {"full": done["changed"]}


def test_a_wrong_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property sees a pass that scales attention wrongly."""
    right = AbsorbMla.run

    def wrong(self: AbsorbMla, program: Program, report: PassReport) -> Program:
        def halved(node: Node) -> Node:
            if node.op != "latent_attention":
                return node
            return replace(node, attrs=node.attrs.updated(scale=node.attrs["scale"] / 2))

        def changed(graph: Graph) -> Graph:
            return graph.with_nodes(map(halved, graph.nodes))

        return right(self, program, report).map_entries(changed)

    monkeypatch.setattr(AbsorbMla, "run", wrong)
    quick = hypothesis_settings(
        max_examples=60, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip

    @quick
    @given(models())
    def through(program: Program) -> None:
        check(program, Setting())

    with pytest.raises(AssertionError, match="differs by"):
        through()


def test_a_router_of_one_normalised_expert_keeps_the_order_of_its_weights() -> None:
    """All weights are 1, so that sorted by expert they look like the router's own."""
    b = GraphBuilder("main")
    rows = symbol("B") * symbol("S")
    x = b.input("x", TensorType(DType.f32, (symbol("B"), symbol("S"), 8)))
    (flat,) = b.call("reshape", x, shape=(rows, 8))
    shapes = {"gate": (8, 8), "gate_up": (8, 6, 8), "down": (8, 8, 3)}
    weights = {n: Source(n, TensorType(DType.f32, shape)) for n, shape in shapes.items()}
    gate, gate_up, down = (Weight(n, source.type) for n, source in weights.items())
    attrs = {
        "score": "softmax", "groups": 1, "keep": 1, "group_score": "max", "fill": 0.0,
        "top_k": 1, "normalise": True, "scale": 1.0,
    }  # fmt: skip
    idx, w = spell.route(b, flat, gate, None, attrs, "traced")
    y = spell.experts(b, flat, idx, w, gate_up, down, "grouped")
    source = random_source({n: s.type for n, s in weights.items()})
    program = Program("top1", {"main": b.finish([y], ("y",))}, weights, RANGES, source)
    done = pipeline.apply(program, [*pipeline.RAISE], verify_each=True)
    assert {"route", "experts"} <= {n.op for n in done.entries["main"].nodes}
