"""`dsc opt` reads what people write and what the other verbs print, or says what is wrong where."""

from __future__ import annotations

import inspect
import random
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dsc import pipeline
from dsc.cli import main
from dsc.errors import ParseError, UsageError
from dsc.ir.parser import parse_program, parse_verified
from dsc.ir.stages import Stage
from tests.rewrite.harness import doc_block

from .broken import ASKED, BROKEN, break_pass, long_steps, ran
from .conftest import Invoke

DATA = Path(__file__).resolve().parent.parent / "data"
SMALL_LM = DATA / "small_lm.dsc"


def document(name: str, block: str) -> str:
    module = inspect.getmodule(type(pipeline.make(name)))
    return doc_block(inspect.getdoc(module) or "", block)


# --- what is written by hand ----------------------------------------------------------------------


@pytest.mark.parametrize("name", pipeline.PASSES)
def test_the_text_in_a_pass_runs_as_a_file(name: str, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "before.dsc").write_text(document(name, "Before"))
    line = ("opt", str(tmp_path / "before.dsc"))
    done = invoke(*line, "-p", name)
    assert done.exit_code == 0
    stage = parse_verified(done.stdout).stage
    assert stage >= (pipeline.make(name).ensures or min(pipeline.make(name).needs))
    assert invoke(*line, "--explain", name).exit_code == 0


NEEDED = {"cache_write": "OPTIMIZED", "fused": "LOWERED"}
# ^ stands before the place that the error must point at.
WRONG = {
    "a declared type": "(%x: f32[B,4]) {\n%y = relu %x : ^f32[B,5]\nreturn %y }",
    "a declared element type": "(%x: f32[B]) {\n%y = relu %x : ^bf16[B]\nreturn %y }",
    "an operand's type": "(%x: f32[B], %z: f32[4]) {\n%y = ^linear %x, %z : f32[B]\nreturn %y }",
    "the number of results": "(%x: f32[B]) {\n%y, %z = ^relu %x\nreturn %y }",
    "a value nobody defines": "(%x: f32[B]) {\n%y = relu ^%z\nreturn %y }",
    "a value defined twice": "(%x: f32[B]) {\n^%x = relu %x\nreturn %x }",
    "a result nobody defines": "(%x: f32[B]) {\nreturn ^%y }",
    "an operator of another stage": (
        "(%x: f32[2,2,3,4]) {\n%y = ^sdpa %x, %x, %x {scale=0.5, causal=false}\nreturn %y }"
    ),
    "an attribute's value": "(%x: f32[B]) {\n%y = ^sum %x {axes=[3]}\nreturn %y }",
    "an attribute's kind": '(%x: f32[B]) {\n%y = sum %x {axes=^"0"}\nreturn %y }',
    "an attribute that is not": "(%x: f32[B]) {\n%y = relu %x {^axis=0}\nreturn %y }",
    "two outputs of one name": '(%x: f32[B]) {\n^return %x, %x as "x" }',
    "an output that updates what it does not fit": (
        "(%x: f32[B], %z: f32[B,2]) {\n%y = relu %x\n^return %y updates %z }"
    ),
    "storage that is read after it is overwritten": (
        "(%c: f32[B,4,2], %x: f32[B,1,2], %n: i64[B]) {\n"
        "%e = cache_write %c, %x, %n\n%y = ^relu %c\nreturn %y, %e }"
    ),
    "a body": (
        "(%x: f32[B]) {\n%y = fused %x {body=graph b(%x: f32[B]) {\n"
        "%y = relu %x : ^f32[B,1]\nreturn %y\n}} : f32[B]\nreturn %y }"
    ),
    "a size without a range": "(%x: f32[Q]) {\nreturn %x }",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_breaks_a_rule_is_shown_where_it_stands(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marked = WRONG[what]
    stage = next((s for op, s in NEEDED.items() if op in marked), "CANONICAL")
    lines = f'program "p" {{stage={stage}}}\nsymbols {{B=[1,4]}}\ngraph ^g{marked}'.splitlines()
    line = max(i for i, each in enumerate(lines) if "^" in each)
    column = lines[line].index("^")
    lines = [each.replace("^", "") for each in lines]
    path = tmp_path / "wrong.dsc"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as ended:
        main(["opt", str(path), "-p", "eliminate_dead_code"])
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert error.splitlines()[1:] == [
        f"  where:  {path}, line {line + 1}, column {column + 1}",
        f"  | {lines[line]}",
        f"  | {' ' * column}^",
    ]


def mutated(text: str, rng: random.Random) -> str:
    """The text with a few words deleted, swapped, repeated or put elsewhere, numbers changed."""
    words = re.findall(r"\w+|\s+|.", text)
    for _ in range(rng.randint(1, 3)):
        full = [i for i, word in enumerate(words) if word.strip()]
        numbers = [i for i in full if words[i].isdigit()] or full
        i, j, n = rng.choice(full), rng.choice(full), rng.choice(numbers)
        match rng.randrange(6):
            case 0:
                del words[i]
            case 1:
                words[i], words[j] = words[j], words[i]
            case 2:
                words.insert(i, words[j])
            case 3:
                words[i] = words[j]
            case _:
                words[n] = rng.choice(["0", "1", "2", "7", "-1", "1e400", "9" * 18, "9" * 30])
    return "".join(words)


def test_a_text_that_somebody_damaged_is_a_program_or_one_located_error() -> None:
    rng = random.Random(0)
    traced = (DATA / "traced" / "v3.dsc").read_text()
    raised = document("fuse", "After"), document("append_cache_in_place", "Before")
    texts = [SMALL_LM.read_text(), *raised, traced]
    outcomes = Counter[str]()
    for round_ in range(600):
        text = mutated(texts[0 if round_ % 20 else 3] if round_ % 3 else rng.choice(raised), rng)
        found = outcome(text)
        outcomes[found] += 1
    assert outcomes.keys() == {"read", "refused"}, outcomes
    assert outcomes["refused"] > 300
    assert outcomes["read"] > 20


def outcome(text: str) -> str:
    """What comes of a text: "read", "refused" at a place in it, or else what was raised."""
    try:
        parse_verified(text)
    except ParseError as error:
        located = re.match(r"line \d+, column \d+$", error.where or "")
        return "refused" if located and (error.picture or "").endswith("^") else str(error)
    return "read"


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "the text is empty"), (" \n", "the text is empty"), ("# a\n", "comments alone")],
)
def test_an_empty_text_is_called_empty_with_its_place(
    text: str, words: str, invoke: Invoke, tmp_path: Path
) -> None:
    file = tmp_path / "empty.dsc"
    file.write_text(text)
    with pytest.raises(ParseError, match=rf"{words}\n  where:  .*empty\.dsc, line 1"):
        invoke("opt", str(file))
    with pytest.raises(ParseError, match=rf"{words}\n  where:  .*empty\.dsc, line 1"):
        invoke("diff", str(file), str(file))
    with pytest.raises(ParseError, match=rf"{words}\n  where:  standard input, line 1"):
        invoke("opt", "-", typed=text.encode())


# --- what the other verbs print -------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each printing verb prints."""
    folder = tmp_path_factory.mktemp("printed")
    model = str(SMALL_LM)
    lines = {
        "whole": ["inspect", model, "--backend", "null"],
        "entry": ["inspect", model, "--backend", "null", "--entry", "decode"],
        "after": ["inspect", model, "--backend", "null", "--after", "absorb_mla"],
        "opened-entry": ["inspect", str(folder / "out"), "--entry", "prefill"],
        "opt": ["opt", model, "-p", "specialise_entries,absorb_mla"],
    }
    compiling = ["compile", model, "--backend", "null", "-o", str(folder / "out")]
    compiling += ["--dump-dir", str(folder), "--print-ir-after", "fuse"]
    from typer.testing import CliRunner

    from dsc.cli import build_app

    for name, line in {"compile": compiling, **lines}.items():
        done = CliRunner().invoke(build_app(), line, catch_exceptions=False)
        (folder / f"{name}.dsc").write_text(done.stdout)
    shutil.copy(folder / "out" / "program.dsc", folder / "opened.dsc")
    return folder


def test_what_one_verb_prints_the_other_reads(printed: Path, invoke: Invoke) -> None:
    texts = sorted(printed.glob("*.dsc"))
    assert len(texts) > 12
    for path in texts:
        parse_verified(path.read_text())
        fused = parse_verified(invoke("opt", str(path), "-p", "fuse,own_outputs").stdout)
        assert fused.stage is Stage.PLANNED
        assert any(node.op == "fused" for graph in fused.entries.values() for node in graph.nodes)


def test_fusing_again_gives_the_same(printed: Path, invoke: Invoke) -> None:
    once = invoke("opt", str(printed / "after.dsc"), "-p", "fuse")
    (printed / "once").write_text(once.stdout)
    assert invoke("opt", str(printed / "once"), "-p", "fuse").stdout == once.stdout


@pytest.mark.parametrize("name", ["absorb_mla", "raise_rope", "specialise_entries", "raise_mla"])
def test_a_text_that_is_too_far_names_the_one_to_take(
    name: str, printed: Path, invoke: Invoke
) -> None:
    with pytest.raises(UsageError, match=f"{name} takes a program at stage") as told:
        invoke("opt", str(printed / "whole.dsc"), "-p", name)
    option = (told.value.hint or "").partition("dsc inspect MODEL ")[2].split()
    assert option[0] == "--after"
    traced = str(DATA / "traced" / "v3.dsc")
    earlier = invoke("inspect", traced, "--backend", "null", "--weights", "none", *option)
    program = parse_program(earlier.stdout)
    assert pipeline.make(name).needs >= {program.stage}


def test_a_text_that_is_not_far_enough_names_what_leads_there(invoke: Invoke) -> None:
    traced = str(DATA / "traced" / "v3.dsc")
    with pytest.raises(UsageError) as told:
        invoke("opt", traced, "-p", "absorb_mla")
    option = (told.value.hint or "").partition(": ")[2].split()
    assert "mla_attention" in invoke("opt", traced, *option).stdout


# --- a pass that is wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("fails", [True, False], ids=["fails", "changes results"])
def test_the_line_of_a_wrong_pass_repeats_it_from_the_text_alone(
    name: str,
    fails: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    break_pass(monkeypatch, name, fails)
    words = "failed: ZeroDivisionError" if fails else "changed what the program computes"
    line = ("compile", long_steps(tmp_path), *ASKED, *(() if fails else ("--verify-each",)))
    code, error = ran(capsys, *line, "-o", str(tmp_path / "out"))
    assert code == 1
    assert f"pass {name} {words}" in error
    (repeat,) = re.findall(r"reproduce:  dsc (.*)", error)
    again, told = ran(capsys, *shlex.split(repeat))
    assert again == 1
    assert f"pass {name} {words}" in told
    option, value = BROKEN[name]
    usual, _ = ran(capsys, *shlex.split(repeat.replace(f"{option}={value}", "")))
    assert usual == 0, "it is the option that shows it"


def test_what_a_dump_lists_replays_to_the_last_of_its_texts(tmp_path: Path, invoke: Invoke) -> None:
    dump = tmp_path / "dump"
    line = ("compile", long_steps(tmp_path), *ASKED, "--dump-dir", str(dump))
    invoke(*line, "-o", str(tmp_path / "out"))
    listed = (dump / "passes.txt").read_text().splitlines()
    texts = sorted(dump.glob("*.dsc"))
    assert [path.read_text().splitlines()[0] for path in texts[1:]] == [
        f"# after {each}" for each in listed
    ]
    assert "append_cache_in_place{slack=64}" in listed
    assert "shard{ranks=4}" in listed
    last = texts[-1].read_text().partition("\n")[2]
    for passes in (",".join(listed), (dump / "passes.txt").read_text()):
        assert invoke("opt", str(texts[0]), "-p", passes).stdout == last


def test_an_explanation_is_of_the_pass_with_its_options(invoke: Invoke) -> None:
    before = "specialise_entries,absorb_mla,merge_projections"
    line = ("opt", str(SMALL_LM), "-p", before, "--explain")
    low = invoke(*line, "fuse{level=2}").stdout
    high = invoke(*line, "fuse").stdout
    assert low.startswith("fuse{level=2} on t")
    assert "fired   level 2 " in low
    assert "from level 3" in low
    assert "fired   level 3 " in high
    with pytest.raises(UsageError, match="--explain"):
        invoke(*line, "fuse,own_outputs")


def test_the_help_shows_how_options_are_written_and_the_list_what_they_are(invoke: Invoke) -> None:
    told = " ".join(invoke("opt", "--help").stdout.split())
    assert "pass,pass{option=value}" in told
    assert "fuse{level=1,limits=tvm}" in told
    listed = invoke("opt", "--list").stdout
    names = [line for line in listed.splitlines() if not line.startswith(" ")]
    assert names == list(pipeline.PASSES)
    assert "    level=3 (one of 0, 1, 2, 3)\n    limits (a backend's name)\n" in listed


def test_a_wrong_option_is_told_before_the_file_is_read(invoke: Invoke) -> None:
    with pytest.raises(UsageError, match="fuse: level is 4\n  to do:  level of fuse is one of 0"):
        invoke("opt", "nowhere.dsc", "-p", "fuse{level=4}")
