"""`dsc generate`: prompts from anywhere, the model's settings or the user's, ends with reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as AsBytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from dsc.backends.null import NullExecutable
from dsc.backends.triton.client import InterpretedExecutable
from dsc.cli.answers import chosen_sampling
from dsc.cli.given import stop_ids
from dsc.errors import ArtifactError, FileError, UsageError
from dsc.frontends.generation_config import GenerationSettings
from dsc.ir.parser import parse_program
from dsc.sampling import Sampling

from .conftest import SMALL_LM, FakeApi, Invoke


def test_text_streams_until_the_stop_id(api: FakeApi, invoke: Invoke, artifact: Path) -> None:
    result = invoke("generate", str(artifact), "--prompt", "abc", "--trust")
    assert result.stdout == "defg\n"  # h is the stop id, 7
    assert api.loaded == [{"path": artifact, "trust": True}]


def test_a_stop_text_is_no_byte_that_a_vocabulary_spells_like_it() -> None:
    bytes_ = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(bytes_, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), AsBytes()
    tokenizer.add_special_tokens(["<end>"])
    assert bytes_["é"] in tokenizer.encode("逐").ids
    ends = stop_ids(tokenizer, (7,), ["é", "Ċ", "a", "<end>", "no token"])
    assert ends == {7, bytes_["a"], tokenizer.token_to_id("<end>")}


def test_json_has_the_reason_and_phases_apart(api: FakeApi, invoke: Invoke, artifact: Path) -> None:
    line = ("generate", str(artifact), "--prompt", "abc", "--max-new-tokens", "3", "--json")
    document = json.loads(invoke(*line).stdout)
    (answer,) = document["answers"]
    assert answer["text"] == "def"
    assert document["sampling"] == "greedily"
    assert answer["finish_reason"] == "length"
    assert (answer["prompt_tokens"], answer["new_tokens"]) == (3, 3)
    phases = document["load_s"], document["prefill_s"], document["decode_s"]
    assert all(seconds > 0 for seconds in phases)
    assert document["first_token_s"] >= document["prefill_s"]
    assert document["decode_tokens_per_s"] == pytest.approx(2 / document["decode_s"])


def test_several_prompts_are_answered_together_each_under_its_own(
    api: FakeApi, invoke: Invoke, artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "f").write_text("cde\n")
    line = ["generate", str(artifact), "--prompt", "a", "--prompt", "ab", "--file", f"{tmp_path}/f"]
    shown = invoke(*line).stdout
    assert shown == "== 1 of 3: a\nbcdefg\n== 2 of 3: ab\ncdefg\n== 3 of 3: cde\nfg\n"
    assert api.model.sessions == [(2, 64)]  # the model's own limits
    document = json.loads(invoke(*line, "--json").stdout)
    found = document.pop("answers")
    assert document.keys() >= {"load_s", "prefill_s", "decode_s"}  # as of one prompt
    assert [(each["prompt"], each["text"]) for each in found] == [
        ("a", "bcdefg"),
        ("ab", "cdefg"),
        ("cde", "fg"),
    ]
    assert {each["finish_reason"] for each in found} == {"stop"}


def test_a_prompt_comes_from_standard_input(api: FakeApi, invoke: Invoke, artifact: Path) -> None:
    assert invoke("generate", str(artifact), "--prompt", "-", typed=b"abc\n").stdout == "defg\n"
    with pytest.raises(UsageError, match="only once"):
        invoke("generate", str(artifact), "--prompt", "-", "--file", "-")


@pytest.mark.parametrize(
    ("line", "problem", "where"),
    [
        (["--prompt", ""], "no token", "--prompt"),
        (["--prompt", "a", "--prompt", ""], "no token", "--prompt, number 2"),
        (["--file", "empty"], "no token", "--file empty"),
        (["--file", "none"], "No such file", "none"),
        (["--file", "bytes"], "byte 2 is 0xff", "bytes"),
        (["--prompt", "-"], "byte 0 is 0xfe", "standard input"),
        (["--prompt", "a" * 64], "64 tokens", "--prompt"),
        ([], "no prompt", None),
        (["--prompt", "a", "--stop", ""], "--stop is empty", None),
        (["--prompt", "a", "--greedy", "--top-p", "0.5"], "--top-p", None),
    ],
)
def test_what_cannot_be_continued_is_refused_in_words(
    line: list[str],
    problem: str,
    where: str | None,
    api: FakeApi,
    invoke: Invoke,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises((FileError, UsageError), match=problem) as refused:
        invoke("generate", str(artifact), *line, typed=b"\xfe")
    assert refused.value.where == where
    assert not api.model.sessions


def test_a_full_context_ends_the_text_and_says_so(
    api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    api.model.manifest = {"generation": {"eos_token_id": []}}
    api.model.max_context = 8
    result = invoke("generate", str(artifact), "--prompt", "abc")
    assert result.stdout == "defgh\n"
    assert "--max-context" in result.stderr
    enough = invoke("generate", str(artifact), "--prompt", "abc", "--max-new-tokens", "5")
    assert (enough.stdout, enough.stderr) == ("defgh\n", "")


def test_a_stop_text_cuts_the_text(api: FakeApi, invoke: Invoke, artifact: Path) -> None:
    line = ("generate", str(artifact), "--prompt", "abc", "--stop", "fg", "--stop", "zzz")
    assert invoke(*line).stdout == "de\n"
    (answer,) = json.loads(invoke(*line, "--json").stdout)["answers"]
    assert answer["finish_reason"] == "stop"
    one = invoke("generate", str(artifact), "--prompt", "abc", "--stop", "e")  # one token's text
    assert one.stdout == "d\n"


def test_the_artifacts_own_settings_hold_and_options_win(
    api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    own = {"eos_token_id": [5, 9], "stop_strings": ["g"], "do_sample": True, "temperature": 50.0}
    api.model.manifest = {"generation": own}
    line = ("generate", str(artifact), "--prompt", "abc", "--seed", "3")
    drawn = invoke(*line).stdout
    assert drawn == invoke(*line).stdout != "de\n"
    told = invoke(*line, "--stats").stderr.splitlines()[0]
    assert told == "sampling draws: --temperature 50, --seed 3"
    assert invoke(*line, "--greedy").stdout == "de\n"
    assert invoke(*line, "--temperature", "0").stdout == "de\n"
    assert invoke(*line, "--top-k", "1").stdout == "de\n"
    api.model.manifest = {"generation": {"stop_strings": ["g"], "eos_token_id": [9]}}
    assert invoke(*line).stdout == "def\n"


@pytest.mark.parametrize(
    ("own", "asked", "wanted"),
    [
        ({}, {}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, {}, Sampling(temperature=0.6, top_p=0.9)),
        ({"do_sample": True, "top_k": 5}, {}, Sampling(sample=True, top_k=5)),
        ({"do_sample": True, "top_k": 5}, {"top_k": 0}, Sampling(sample=True)),
        ({"do_sample": False, "min_p": 0.1}, {"top_p": 0.5}, Sampling(True, 1.0, 0, 0.5, 0.1)),
        ({"do_sample": True}, {"repetition_penalty": 2.0}, Sampling(True, repetition_penalty=2.0)),
        ({}, {"repetition_penalty": 2.0}, Sampling(repetition_penalty=2.0)),
    ],
)
def test_what_is_asked_wins_over_the_models_own(
    own: dict[str, Any], asked: dict[str, float], wanted: Sampling
) -> None:
    kept = GenerationSettings(**own)
    assert chosen_sampling(kept, asked) == wanted
    assert not chosen_sampling(kept, asked, greedy=True).sample


def test_damaged_settings_of_an_artifact_are_refused(
    api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    api.model.manifest = {"generation": {"temperature": "hot"}}
    with pytest.raises(ArtifactError, match="temperature"):
        invoke("generate", str(artifact), "--prompt", "abc")


def test_a_backend_that_computes_nothing_is_refused(
    api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    api.model.executable = NullExecutable(parse_program(SMALL_LM.read_text()))
    with pytest.raises(UsageError, match="computes nothing"):
        invoke("generate", str(artifact), "--prompt", "abc")


def test_an_interpreter_says_that_it_stands_in_and_is_slow(
    api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    api.model.executable = object.__new__(InterpretedExecutable)
    result = invoke("generate", str(artifact), "--prompt", "abc")
    assert result.stdout == "defg\n"
    assert "no GPU here" in result.stderr
    assert "seconds for each token" in " ".join(result.stderr.split())


def test_stats_tell_loading_prompts_and_decoding_apart(
    api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    result = invoke("generate", str(artifact), "--prompt", "abc", "--stats")
    names = [line.split()[0] for line in result.stderr.splitlines()]
    assert result.stderr.startswith("sampling greedily\n")
    assert names == [
        "sampling",
        "load_s",
        "prompt_tokens",
        "first_token_s",
        "prefill_s",
        "prefill_tokens_per_s",
        "decode_s",
        "decode_tokens_per_s",
        "new_tokens",
    ]
