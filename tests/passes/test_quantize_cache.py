"""Which states become codes, what of a program stays, and what is compared."""

from __future__ import annotations

import pytest

from dsc import pipeline
from dsc.asked import cache_format_of
from dsc.ir.interface import Storage
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.passes.quantize_cache import QuantizeCache
from dsc.rewrite.base import PassReport

TEXT = """program "p" {stage=CANONICAL}
interface {
  limits {max_batch=4, max_context=32, prefill_chunk=8}
  state %past.0.latent as "present.0.latent" : f32[20] {storage="grown"}
  state %past.0.rope as "present.0.rope" : f32[6] {storage="grown"}
}
symbols {B=[1,4], P=[0,32], S=[1,8]}
graph step(%input_ids: i64[B,S], %q: f32[B,S,2,20], %r: f32[B,S,2,6], %new: f32[B,S,20],
    %keys: f32[B,S,6], %past.0.latent: f32[B,P,20], %past.0.rope: f32[B,P,6], %lengths: i64[B]) {
  %c = append %past.0.latent, %new, %lengths
  %k = append %past.0.rope, %keys, %lengths
  %o = latent_attention %q, %r, %c, %k, %lengths {scale=0.5}
  return %o as "logits", %c as "present.0.latent" updates %past.0.latent,
      %k as "present.0.rope" updates %past.0.rope
}"""
FP8 = "f8e4m3{1x128,f32,behind}"


def program(text: str = TEXT) -> Program:
    return parse_program(text)


def types(program: Program) -> dict[str, str]:
    return {v.name: str(v.type) for v in program.entries["step"].values()}


def test_latents_become_codes_and_rope_keys_stay_numbers() -> None:
    report, before = PassReport(), program()
    done = QuantizeCache().run(before, report)
    assert report.fired == {"quantise": 1}
    assert report.places == {"quantise": ["past.0.latent"]}
    changed = {name for name, t in types(done).items() if t != types(before)[name]}
    assert changed == {"past.0.latent", "c"}
    assert types(done)["c"] == f"{FP8}[B,P+S,20]"
    states = {s.input: (str(s.type), s.nbytes, s.storage) for s in done.states}
    assert states == {
        "past.0.latent": (f"{FP8}[20]", 24, Storage.GROWN),
        "past.0.rope": ("f32[6]", 24, Storage.GROWN),
    }
    assert (cache_format_of(before), cache_format_of(done)) == ("bf16", "fp8")
    again = PassReport()
    assert QuantizeCache().run(done, again) is done
    assert not again.fired
    compared = QuantizeCache().comparable(before, done)
    assert compared.entries == before.entries
    assert compared.interface == before.interface


def test_later_passes_are_verified_over_caches_in_codes() -> None:
    done = pipeline.apply(program(), ["quantize_cache", "fuse", "own_outputs"], verify_each=True)
    assert types(done)["past.0.latent"] == f"{FP8}[B,P,20]"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("%x = neg %c", "neg reads rows of %past.0.latent"),
        ("%x = neg %past.0.latent", "neg reads rows of %past.0.latent"),
        ("%x = latent_attention %q, %r, %k, %c, %lengths {scale=1.0}", "reads rows of"),
    ],
)
def test_all_states_stay_numbers_where_somebody_reads_one_otherwise(extra: str, words: str) -> None:
    text = TEXT.replace("  %o = ", f"  {extra}\n  %o = ")
    if "latent_attention %q, %r, %k" in extra:
        text = text.replace("20", "6")
    report, before = PassReport(), program(text)
    assert QuantizeCache().run(before, report) is before
    assert any(words in miss.reason for miss in report.near)
    assert not report.fired
