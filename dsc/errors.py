"""The mistakes dsc names: one class per kind of mistake a user can make, one message template.

A `DscError` says *what* is wrong, *where* in the model (the PyTorch module path, a file, a line)
and what to do about it. The command line prints it without a traceback and exits with 2. Anything
else that escapes is our bug, exits with 1, and leaves a report; `InternalError` carries what is
needed to reproduce it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def printable(text: str) -> str:
    r"""A text whose odd characters are written out: names in files may hold codes for a terminal.

    >>> print(printable("the key \x1b[2J is unknown"))
    the key \x1b[2J is unknown
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class DscError(Exception):
    """A user's mistake, or a limit of dsc that the user has met.

    `what` is one sentence (or a short list, one item a line); `where` is a module path such as
    `model.layers.3.self_attn`, a file, or a position; `hint` says what to do; `picture` is the
    neighbourhood of IR, printed as it stands.

    >>> print(DscError("head_dim is 0", where="config.json", hint="set head_dim to 64"))
    head_dim is 0
      where:  config.json
      to do:  set head_dim to 64
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        where: str | None = None,
        hint: str | None = None,
        picture: str | None = None,
    ) -> None:
        what, where, hint = printable(what), where and printable(where), hint and printable(hint)
        super().__init__(what, where, hint, picture)
        self.what = what
        self.where = where
        self.hint = hint
        self.picture = picture

    def __str__(self) -> str:
        """Fill the template: what, where in the model, the picture, what to do."""
        lines = [self.what]
        if self.where:
            lines.append(_labelled("where:", self.where))
        if self.picture:
            lines.extend("  | " + line for line in self.picture.splitlines())
        if self.hint:
            lines.append(_labelled("to do:", self.hint))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """Return the error as data, for `--json`."""
        parts = {"error": type(self).__name__, "what": self.what, "where": self.where}
        parts |= {"hint": self.hint, "picture": self.picture}
        return {key: text for key, text in parts.items() if text}


class UsageError(DscError):
    """An argument that cannot be right: an unknown name, a missing file, contradicting options."""


class NoNumbers(UsageError):
    """Logits that give no token; `ids` [B, n] are those that a call had chosen before."""

    def __init__(self, what: str, ids: Any) -> None:
        super().__init__(what)
        self.args = (what, ids)
        self.ids = ids


class FileError(DscError):
    """A path that cannot be read or written: no such folder, no right, no room."""


class ConfigError(DscError):
    """A model configuration that is incomplete or contradicts itself."""


class CheckpointError(DscError):
    """A checkpoint folder whose files are missing, damaged or do not fit the configuration."""


class UnsupportedArchitecture(DscError):
    """A model that is outside the family dsc compiles."""


class UnsupportedOperator(DscError):
    """Operators that a frontend cannot read or a backend cannot emit; all of them in one error.

    `places` are those in the program that are refused, where they are known.
    """

    def __init__(
        self,
        what: str,
        where: str | None = None,
        hint: str | None = None,
        picture: str | None = None,
        places: Sequence[str] = (),
    ) -> None:
        super().__init__(what, where, hint, picture)
        self.places = places


class BackendUnavailable(DscError):
    """A backend whose toolchain is not on this machine: what is missing and how to install it."""

    def __init__(self, what: str, hint: str, where: str | None = None) -> None:
        super().__init__(what, where, hint)
        self.args = (what, hint, where)


class RankError(DscError):
    """A rank that died, fell silent, never came, or runs something else than the others."""


class DeviceError(DscError):
    """A device whose driver failed a call, or on which nothing runs any more since one failed."""


class ArtifactError(DscError):
    """An artifact folder that exists already, is damaged, is too new, or is not trusted."""


class VerificationError(DscError):
    """A program that breaks a rule of the IR, or a result that left its tolerance.

    `culprit` is the node or graph to blame, where there is one, and `part` what of it: "type" or
    "return"; whoever read the program from a text knows where that stands.
    """

    def __init__(
        self,
        what: str,
        where: str | None = None,
        hint: str | None = None,
        picture: str | None = None,
        culprit: object = None,
        part: str = "",
    ) -> None:
        super().__init__(what, where, hint, picture)
        self.culprit = culprit
        self.part = part


class ParseError(DscError):
    """Text that is not a `.dsc` program."""


class MemoryLimitError(DscError):
    """A plan that needs more memory than the limit set for its device."""


class InternalError(Exception):
    """Our bug: a pass or an emitter failed on a program it should have accepted.

    Raised `from` the original exception. `program` is the text IR just before the failure and
    `command` the exact line that reproduces it when that text is saved as `repro.dsc`.
    """

    def __init__(self, what: str, program: str = "", command: str = "") -> None:
        super().__init__(what, program, command)
        self.what = what
        self.program = program
        self.command = command

    def __str__(self) -> str:
        """Show the sentence alone; the program may be thousands of lines."""
        return self.what


def one_of(name: str, known: Iterable[str]) -> str:
    """The hint about a name that is not known: the nearest one, where one is near, and all.

    >>> one_of("absorb_mia", ["absorb_mla", "fuse"]), one_of("x", ["fuse"])
    ('did you mean absorb_mla? One of absorb_mla, fuse', 'one of fuse')
    """
    from difflib import get_close_matches

    names = list(known)
    near = get_close_matches(name, names, 1)
    listed = ", ".join(names)
    return f"did you mean {near[0]}? One of {listed}" if near else f"one of {listed}"


def _labelled(label: str, text: str) -> str:
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"  {label}  {first}", *(" " * (len(label) + 4) + line for line in rest)])
