"""Configurations by name: what `--config NAME` loads when MODEL is `models/v3.py`.

Each is a `config.json` in this package's `configs/`, in V3 form (sigmoid router with bias), at the
widths of a published model. `tiny` is the config of the trained checkpoint in `tiny-v3/`.
"""

from __future__ import annotations

from pathlib import Path

from dsc.errors import UsageError, one_of
from dsc.frontends.family import ModelConfig, load_config

_HERE = Path(__file__).resolve().parent
TINY_CHECKPOINT = _HERE / "tiny-v3"
"""The embedded checkpoint: 10 M parameters, every mechanism on, trained on public-domain text."""

CONFIGS: dict[str, Path] = {
    "tiny": TINY_CHECKPOINT / "config.json",
    "moonlight": _HERE / "configs" / "moonlight.json",
    "16b": _HERE / "configs" / "16b.json",
    "236b": _HERE / "configs" / "236b.json",
    "671b": _HERE / "configs" / "671b.json",
}


def config(name: str) -> ModelConfig:
    """The configuration called `name`, or the one in the file or folder at that path."""
    if name in CONFIGS:
        return load_config(CONFIGS[name])
    if Path(name).exists():
        return load_config(Path(name))
    raise UsageError(
        f"no configuration is called {name!r}, and no file has that path",
        hint=one_of(name, CONFIGS),
    )
