"""The `dsc` command: one file per verb, each imported when it is called.

Exit status 0 on success; 2 for a user's mistake or what the machine refuses, with one message and
no traceback; 1 for our bug, with a traceback and a repro file saved and their place printed, and
where `verify` and `bisect` find a difference.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from dsc._version import __version__
from dsc.cli import streams
from dsc.errors import DscError, MemoryLimitError, UsageError
from dsc.files import translated

# The order is the order of the help page.
VERBS = (
    "compile",
    "export",
    "convert",
    "generate",
    "chat",
    "verify",
    "inspect",
    "opt",
    "diff",
    "bisect",
    "bench",
    "profile",
    "tune",
    "models",
    "cache",
    "doctor",
)


ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command from outside: `kill`, a scheduler, a terminal that was closed."""
PARAMETERS = re.compile(
    r"(?<![\w.-])(max_batch|max_context|prefill_chunk|fusion_level|quant_embedding|quant)\b(=?)"
)
"""Parameters of the API that are options of verbs."""
VALIDATORS = "Value error, "
"""What pydantic, which reads arguments for typer, puts before each of its reasons."""


class Verb(TyperCommand):
    """A verb whose help shows a flag as a flag: no `<bool>` beside it, for it takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The verb's parameters."""
        return _plain_flags(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; what is wrong with one is said without the validator's words."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as problem:
            problem.message = problem.message.removeprefix(VALIDATORS)
            raise


class Root(TyperGroup):
    """The command itself, with flags shown as its verbs show theirs."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's parameters."""
        return _plain_flags(super().get_params(ctx))


def _plain_flags(parameters: list[Any]) -> list[Any]:
    for each in parameters:
        if getattr(each, "is_flag", False):
            each.metavar = ""
    return parameters


def build_app() -> typer.Typer:
    """Assemble the command from its verbs."""
    app = typer.Typer(
        name="dsc",
        cls=Root,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for verb in VERBS:
        app.command(verb, cls=Verb)(getattr(import_module(f"dsc.cli.{verb}"), verb))
    return app


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    streams.prepare()
    logging.getLogger("dsc.compiled").setLevel(logging.ERROR)  # verbs say themselves what runs
    status = _run(arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        status = _refused(error, arguments) or status
    sys.exit(status)


def command() -> NoReturn:
    """`main` as a process of its own, which ends without taking its modules apart.

    That takes a second where torch is among them. What was registered for the exit is done.
    """
    status, killed = 1, 0

    def end() -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        if killed:
            os.kill(os.getpid(), killed)
        os._exit(status)

    def take_back(number: int, _: object) -> None:
        """End as Ctrl-C does, which leaves nothing half-written; a second signal ends at once."""
        nonlocal killed
        killed = number
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        sys.exit(128 + number)

    atexit.register(end)  # the first to be registered is the last to be called
    for number in ENDING:
        # A rank may be in a collective, where no handler runs: its launcher cleans up.
        if signal.getsignal(number) is signal.SIG_DFL and "RANK" not in os.environ:
            signal.signal(number, take_back)
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
        raise


_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""How torch says it, in a `RuntimeError`."""


def _run(arguments: list[str]) -> int:
    """Run a verb; the exit status, once what went wrong has been said."""
    try:
        _check_text(arguments)
        build_app()(args=arguments, prog_name="dsc")
    except SystemExit as ended:  # how typer returns
        if isinstance(ended.__context__, BrokenPipeError):
            return _refused(ended.__context__, arguments)
        return ended.code if isinstance(ended.code, int) else 0
    except DscError as error:
        return _say(error)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _refused(error, arguments)
    except MemoryError:
        return _say(_out_of_memory())
    except Exception as error:
        if _OUT_OF_MEMORY in str(error):
            return _say(_out_of_memory())
        return _report_bug(error, arguments)
    return 0


def _refused(error: OSError, arguments: Sequence[str]) -> int:
    """Say what the machine refused; nothing when it is our output that nobody reads any more."""
    ours = error.filename == streams.OUTPUT
    if ours:
        streams.discard_output()
    if isinstance(error, BrokenPipeError):
        return 0 if ours else _report_bug(error, arguments)
    return _say(translated(error))


def _check_text(arguments: Sequence[str]) -> None:
    """Raise `UsageError` for bytes that are no UTF-8, unless they name a file."""
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            if not os.path.lexists(argument):
                shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
                raise UsageError(
                    f"argument {number} holds bytes that are no UTF-8: {shown}",
                    hint="give the text in UTF-8",
                ) from None


def _say(error: DscError) -> int:
    """Print a user's mistake, where somebody still listens; its exit status."""
    with suppress(OSError, ValueError):
        print(f"dsc: {as_typed(str(error))}", file=sys.stderr)
    return error.exit_code


def as_typed(text: str) -> str:
    """A message of the API in the words of the command line: its parameters are options here.

    >>> as_typed("compile it with a larger max_context; max_batch=2 would fit")
    'compile it with a larger --max-context; --max-batch 2 would fit'
    """
    return PARAMETERS.sub(
        lambda found: f"--{found[1].replace('_', '-')}{' ' if found[2] else ''}", text
    )


def _out_of_memory() -> DscError:
    return MemoryLimitError(
        "the machine has not enough memory for this",
        hint="compile for less: --max-batch, --max-context, --prefill-chunk; or free some",
    )


def _report_bug(error: Exception, arguments: Sequence[str]) -> int:
    """Save what is needed to mend our bug and say where it is. Never fails."""
    from dsc.cli.crash import save_crash, told

    what = f"dsc: a bug in dsc, not in what you asked for: {type(error).__name__}: {error}"
    try:
        folder, line = save_crash(error, arguments)
        saved = f"  saved:      {folder / 'traceback.txt'}\n  reproduce:  {line}"
    except Exception as problem:  # nothing can be saved: then it is told here, or lost
        saved = f"  not saved:  {problem}\n\n{told(error, arguments)}"
    with suppress(OSError, ValueError):
        print(f"{what}\n{saved}", file=sys.stderr)
    return 1


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Compile decoders of transformers into Triton kernels, a TVM module or an ONNX model.

    Exit status: 0 on success; 2 for a mistake in what was asked, or what the machine refuses; 1 for
    a bug in dsc, and where verify or bisect finds a difference.
    """
