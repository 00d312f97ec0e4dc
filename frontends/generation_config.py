"""Our own schema of `generation_config.json`: where texts end, and how tokens are drawn.

Like `config.json` it comes from outside: types and ranges are checked, and what dsc does not do is
told in a note instead of being passed over. The checked settings go into the artifact, and are
checked again when they are read from there.

What the file does not say is off. (transformers itself draws from the 50 likeliest tokens where a
file asks for sampling and names no `top_k`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from dsc.errors import ArtifactError, ConfigError, DscError, printable
from dsc.frontends.facts import Facts
from dsc.frontends.folder import GENERATION_FILE, read_object
from dsc.frontends.schema import Schema, sentence
from dsc.ir.limits import OPEN
from dsc.strict_json import AGAIN

Settings = tuple[dict[str, Any], list[str]]
"""What an artifact keeps, as JSON, and notes on what it does not."""
Id = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Share = Annotated[float, Field(ge=0, le=1)]
SILENT = frozenset(
    {"transformers_version", "_from_model_config", "max_length", "max_new_tokens", "use_cache"}
    | {"cache_implementation", "return_dict_in_generate", "output_attentions", "output_scores"}
    | {"output_hidden_states", "output_logits", "trust_remote_code", "chat_format"}
)
"""Keys that change no token: lengths are the caller's to choose, the rest is transformers' own."""


class GenerationSettings(Schema):
    """What an artifact keeps of it. `None` is what nobody said; token ids are in the vocabulary."""

    eos_token_id: Annotated[tuple[Id, ...], Field(strict=False, max_length=4096)] = ()
    bos_token_id: Id | None = None
    pad_token_id: Id | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1e4)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e4)] | None = None
    stop_strings: Annotated[tuple[str, ...], Field(strict=False, max_length=4096)] = ()

    def kept(self) -> dict[str, Any]:
        """The settings as JSON, without what nobody said; the ids that end a text always."""
        said = self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        return {"eos_token_id": list(self.eos_token_id), **said}


def load_generation(folder: Path, facts: Facts) -> Settings:
    """The settings of a checkpoint folder, and notes on what of the file is not used.

    Special ids that `generation_config.json` leaves open are those of `config.json`. Raises
    `ConfigError`.
    """
    file = folder / GENERATION_FILE
    return settings_of(read_object(file, missing_ok=True), facts, str(file))


def settings_of(raw: Mapping[str, Any], facts: Facts, where: str = GENERATION_FILE) -> Settings:
    """`load_generation` for what was read already."""
    said = {key: value for key, value in raw.items() if value is not None}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if name not in said and getattr(facts, name) is not None:
            said[name] = getattr(facts, name)
    for name in ("eos_token_id", "stop_strings"):
        if name in said and not isinstance(said[name], list):
            said[name] = [said[name]]
    found = parse_settings(said, where, ConfigError)
    kept, unknown = found.kept(), set()
    most = OPEN if facts.vocab_size is None else facts.vocab_size
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        ids = kept.get(name, [])
        listed = ids if isinstance(ids, list) else [ids]
        outside = {i for i in listed if not 0 <= i < most}
        unknown |= {f"{name} {i}" for i in outside}
        if isinstance(ids, list) and ids:
            kept[name] = [i for i in ids if i not in outside]
        elif outside:
            del kept[name]
    ignored = sorted(
        key
        for key, value in said.items()
        if key not in GenerationSettings.model_fields and key not in SILENT and _says(value)
    )
    notes = []
    if unknown:
        listed_ids = _some(sorted(unknown))
        notes.append(f"{where}: outside of the vocabulary, left out: {listed_ids}")
    if ignored:
        notes.append(f"{where}: not used: {_some(ignored)}")
    return kept, notes


def parse_settings(
    raw: Mapping[str, Any], where: str, error: type[DscError] = ConfigError
) -> GenerationSettings:
    """Check settings, from a checkpoint or an artifact. Raises `error`."""
    hint = "compile the model again" if error is ArtifactError else AGAIN
    try:
        return GenerationSettings.model_validate(raw)
    except ValidationError as exc:
        raise error(sentence(exc), where, hint) from None


def _some(names: Sequence[str], most: int = 20) -> str:
    """Names for a note, which a file may have many of, long ones and odd ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return printable(", ".join(f"{name:.60}" for name in names[:most])) + more


def _says(value: Any) -> bool:
    """Whether a setting that dsc does not know asks for anything: not what means "off"."""
    return value is True or value not in (0, 1, "", [], {})
