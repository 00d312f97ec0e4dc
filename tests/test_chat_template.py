"""Templates give what transformers gives, and hostile ones end in one error, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dsc import chat_template
from dsc.chat_template import ChatTemplate
from dsc.errors import UsageError

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 < 3 & é?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Count."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So.", "thinking": None, "reasoning": "It was asked."},
    {"role": "user", "content": "And?"},
]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
R1 = """{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}
{%- endif %}{%- set ns = namespace(system='', tool=false) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- for message in messages %}{%- if message['role'] == 'user' %}
{{- '<User>' + message['content'] }}{%- endif %}{%- if message['role'] == 'assistant' %}
{%- set content = message['content'] %}{%- if '</think>' in content %}
{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<Assistant>' + content + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\n' }}{%- endif %}"""
V31 = """{%- if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}
{%- else %}{{ m.role ~ ':' ~ m.content | tojson }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<Assistant>{{ '<think>' if thinking else '</think>' }}{% endif %}"""
QWEN = """{%- for m in messages %}
    {%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>
    {%- endif %}
<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{{ dict(a=1).items() | list }}{{ strftime_now('%Y') | length }}"""


@pytest.fixture
def templates() -> Iterator[Any]:
    """Makes templates, and ends their processes."""
    made: list[ChatTemplate] = []

    def of(text: str, **tokens: str) -> ChatTemplate:
        made.append(ChatTemplate(text, tokens))
        return made[-1]

    yield of
    for each in made:
        each.close()


def theirs(text: str, **values: Any) -> str:
    """What transformers makes of a template."""
    tools = values.pop("tools", None)
    shown, _ = render_jinja_template([TALK], tools, chat_template=text, **values)
    return str(shown[0])


ALL = "{{ messages | tojson }}{{ messages[2].thinking + messages[4].reasoning_content }}"


@pytest.mark.parametrize("text", [R1, V31, QWEN, ALL], ids=["r1", "v3.1", "qwen", "all"])
def test_a_template_writes_what_transformers_writes(templates: Any, text: str) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = templates(text, **tokens)
    for options in ({}, {"thinking": True}, {"tools": TOOLS}, {"enable_thinking": False}):
        for begun in (False, True):
            wanted = theirs(text, add_generation_prompt=begun, **tokens, **options)
            assert ours.render(TALK, add_generation_prompt=begun, **options) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ raise_exception('no tools here') }}", "refuses: no tools here"),
        ("{% if %}", "refuses: line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "no name like"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "refuses"),
        ("{% include '/etc/passwd' %}", "refuses"),
        ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 8388608 characters"),
        ("{{ 'a' * 10 ** 11 }}", "too much memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
        ("{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
         "{% endfor %}", "too much memory"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "more than 1 s"),
    ],
)  # fmt: skip
def test_a_hostile_template_ends_in_one_error(
    templates: Any, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1.0 if "1 s" in words else 10.0)
    hostile, begun = templates(text), time.monotonic()
    with pytest.raises(UsageError, match=words):
        hostile.render(TALK)
    assert time.monotonic() - begun < 10
    hostile.text = "{{ messages[0].content }}"  # the next rendering is none the worse for it
    assert hostile.render(TALK) == "Be brief."
