"""The `dsc` command: one file per verb, each imported when it is called.

Exit status 0 on success; 2 for a user's mistake, with one message and no traceback; 1 for our bug,
with a traceback and a repro file saved and their place printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import typer

from dsc._version import __version__
from dsc.errors import DscError

# The order is the order of the help page.
VERBS = (
    "compile",
    "export",
    "generate",
    "verify",
    "inspect",
    "opt",
    "diff",
    "bisect",
    "bench",
    "profile",
    "doctor",
)


def build_app() -> typer.Typer:
    """Assemble the command from its verbs."""
    app = typer.Typer(
        name="dsc",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for verb in VERBS:
        app.command(verb)(getattr(import_module(f"dsc.cli.{verb}"), verb))
    return app


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        build_app()(args=arguments, prog_name="dsc")
    except DscError as error:
        print(f"dsc: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        sys.exit(_report_bug(error, arguments))
    sys.exit(0)


def _report_bug(error: Exception, arguments: Sequence[str]) -> int:
    """Save what is needed to mend our bug and say where it is."""
    from dsc.cli.crash import save_crash

    folder, line = save_crash(error, arguments)
    print(
        f"dsc: a bug in dsc, not in what you asked for: {type(error).__name__}: {error}\n"
        f"  saved:      {folder / 'traceback.txt'}\n"
        f"  reproduce:  {line}",
        file=sys.stderr,
    )
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
    """Compile DeepSeek-V3-family models into Triton kernels, a TVM module or an ONNX model."""
