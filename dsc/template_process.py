"""The process that runs chat templates: one JSON object a line in, one out, under limits.

The environment is transformers' (`utils/chat_template_utils.py` of 5.23), so that a template gives
here what it gives there. Started by `dsc/chat_template.py`.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 1 << 29
"""Address space of the process; Python and Jinja take a fifth of it."""
CPU_SECONDS = 5
"""What one rendering may take."""
MAX_TEXT = 8 << 20
"""Characters that come of one rendering: more than any context holds."""
MAX_MESSAGE = 500


class Generation(Extension):
    """`{% generation %}`: what transformers marks as the model's own words; here only a scope."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore, which lead to Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name of the template
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class PlainDict:
    """`dict` of a template: makes one, and has no attributes to walk."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dict of keys."""
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name like {name!r}")


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter has."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> ImmutableSandboxedEnvironment:
    """Where templates run."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    made.globals["dict"] = PlainDict()
    made.globals["namespace"] = PlainNamespace
    return made


def rendered(text: str, values: Mapping[str, Any]) -> str:
    """What a template makes of values. Raises whatever Jinja or the template raises."""
    parts, size = [], 0
    for part in environment().from_string(text).generate(**values):
        size += len(part)
        if size > MAX_TEXT:
            raise TemplateError(f"it writes more than {MAX_TEXT} characters")
        parts.append(part)
    return "".join(parts)


def answer(line: bytes) -> dict[str, str]:
    """The text of one request, or what went wrong in one line."""
    request = json.loads(line)
    try:
        return {"text": rendered(request["template"], request["values"])}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself without an end"}
    except Exception as problem:  # a template may fail in any way
        words = " ".join(str(problem).split())[:MAX_MESSAGE]
        place = getattr(problem, "lineno", None)
        told = words or type(problem).__name__
        return {"error": f"line {place}: {told}" if place else told}


def main() -> None:
    """Answer requests until there are no more. A request that takes too long ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment()
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
        sys.stdout.buffer.write(json.dumps(answer(line)).encode() + b"\n")
        sys.stdout.buffer.flush()
