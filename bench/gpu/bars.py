"""What was promised of a card, each figure held against its bar: read off the parts' figures alone.

Bars of shares and of times beside another's are those of an H100 and an H200; on another card the
figures are told without one. What was not measured is told with the reason that its part gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]
PLAIN, FP8, HEAD = "671b-3l", "671b-3l fp8", "671b-3l fp8, head too"
BATCH = "671b-3l, 64 sequences"
CARDS = ("H100", "H200")
FORMS = ("bf16", "fp8", "int4", "fp8, head too")


class Missing(Exception):
    """A figure was not measured; says why."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure, and the least that it may be, by card; `None` of a check that just holds."""

    figure: Callable[[Found], float | bool]
    least: Mapping[str, float] | None = None


def _at(found: Found, *path: str) -> Any:
    """A figure by where it stands. Raises `Missing` with the nearest reason above it."""
    here: Any = found
    for at, name in enumerate(path):
        if not isinstance(here, Mapping) or here.get(name) is None:
            told = here if isinstance(here, Mapping) else {}
            why = told.get("error") or told.get("left out") or "it was not measured"
            raise Missing(f"{', '.join(path[: at + 1])}: {why}")
        here = here[name]
    return here


def _of(part: str, step: str, name: str) -> Callable[[Found], float]:
    return lambda found: float(_at(found, part, step, name))


def _times(slow: str, fast: str, step: str) -> Callable[[Found], float]:
    """How many times as long as one model another takes for a step."""
    return lambda found: _at(found, slow, step, "ms") / _at(found, fast, step, "ms")


def _block(step: str) -> Callable[[Found], float]:
    """How many times as long as our attention of a layer the fastest compiled block takes."""

    def figure(found: Found) -> float:
        peers = [x["us"] for name, x in found.get("block", {}).items()
                 if name.startswith(step) and "us" in x]  # fmt: skip
        if not peers:
            _at(found, "block", f"{step}, default", "us")
        own = _at(found, PLAIN, step, "attention_ms") / _at(found, "about", "layers", PLAIN)
        return float(min(peers) / 1e3 / own)

    return figure


def _clean(kind: str) -> Callable[[Found], bool]:
    """Whether the sanitizer found nothing in any model that it saw, and saw one."""

    def figure(found: Found) -> bool:
        told = [x for x in _at(found, kind).values() if isinstance(x, Mapping)]
        if not told:
            _at(found, kind, "a model")
        return all(x["ok"] for x in told)

    return figure


def _tokens(form: str) -> Callable[[Found], bool]:
    return lambda found: (
        bool(_at(found, "tokens", form, "ok"))
        and bool(_at(found, "tokens", form, "chosen on the device as by the host"))
    )


def _both(least: float) -> Mapping[str, float]:
    return dict.fromkeys(CARDS, least)


BARS: Mapping[str, Bar] = {
    "moonlight-6l decode at 512, of copy speed": Bar(
        _of("moonlight-6l", "decode at 512", "of copy speed"), {"H100": 0.75, "H200": 0.65}
    ),
    **{
        f"671b-3l {step}, of copy speed": Bar(_of(PLAIN, step, "of copy speed"), _both(0.88))
        for step in ("decode at 512", "decode at 8000")
    },
    "671b-3l 64 at 4096, of its floor": Bar(_of(BATCH, "64 at 4096", "of limit"), _both(0.80)),
    "FP8 decode at 512, times as fast as bf16": Bar(
        _times(PLAIN, FP8, "decode at 512"), _both(1.3)
    ),
    "FP8 decode at 512 with the head in FP8 too, times as fast as bf16": Bar(
        _times(PLAIN, HEAD, "decode at 512"), _both(1.6)
    ),
    "671b-3l prefill of 4096, of its limit": Bar(
        _of(PLAIN, "prefill of 4096", "of limit"), _both(0.65)
    ),
    "671b-3l prefill of 4096, dense products, of peak": Bar(
        lambda found: float(_at(found, PLAIN, "prefill of 4096", "products", "of matrix peak")),
        _both(0.65),
    ),
    "FP8 prefill of 4096, times as fast as bf16": Bar(
        _times(PLAIN, FP8, "prefill of 4096"), _both(1.3)
    ),
    "attention block, decode at 4096, times as fast as torch.compile": Bar(
        _block("decode at 4096"), _both(3.0)
    ),
    "attention block, prefill of 4096, times as fast as torch.compile": Bar(
        _block("prefill of 4096"), {}
    ),
    **{f"tokens of tiny-v3 in {form}": Bar(_tokens(form)) for form in FORMS},
    "operators over odd shapes": Bar(lambda found: bool(_at(found, "operators", "ok"))),
    "codes over odd shapes": Bar(lambda found: bool(_at(found, "codes", "ok"))),
    **{f"{kind} clean": Bar(_clean(kind)) for kind in ("memcheck", "racecheck")},
}
"""By name, in the order in which they are told. A prompt's block is told alone: cuBLAS multiplies
at most of the peak, so that nobody is three times as fast."""


def judged(found: Found) -> dict[str, dict[str, Any]]:
    """Each bar with its figure, and whether it holds; or with why there is no figure."""
    told = str(found.get("speeds", {}).get("card", ""))
    card = next((name for name in CARDS if name in told), "")
    answers: dict[str, dict[str, Any]] = {}
    for name, bar in BARS.items():
        try:
            figure = bar.figure(found)
        except Missing as why:
            answers[name] = {"missing": str(why)}
            continue
        if bar.least is None:
            answers[name] = {"ok": bool(figure)}
        elif card in bar.least:
            least = bar.least[card]
            answers[name] = {"figure": round(figure, 3), "least": least, "ok": figure >= least}
        else:
            answers[name] = {"figure": round(figure, 3), "least": None}
    return answers
