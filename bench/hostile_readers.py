"""The readers of a checkpoint's files, each given mutated ones: for `hostile_files.py`."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Callable, Generator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bench.hostile_files import unprintable
from bench.hostile_mutations import BAIT, TEXTS, damaged, mutated
from dsc import chat_template, template_process
from dsc.errors import DscError
from dsc.frontends import hub
from dsc.frontends.chat_template import find_chat
from dsc.frontends.facts import Facts
from dsc.frontends.family import MEMBERS
from dsc.frontends.generation_config import load_generation
from dsc.frontends.huggingface import read_config
from dsc.frontends.quantisation import QuantizationConfig
from dsc.frontends.rope_scaling import RopeScaling
from dsc.frontends.states import discover
from dsc.frontends.stock import StockConfig, completed, stock_config, stock_model
from dsc.frontends.tokenizer import find_tokenizer
from dsc.ir.safetensors import open_safetensors
from tests.decoders import CONFIGS
from tests.test_chat_template import TALK

BUILT, FOUND = 0.1, 0.02
"""Shares of configurations that a model is built of, and whose states are found by running it."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MORE: dict[str, dict[str, Any]] = {
    "rotated": CONFIGS["llama"] | {
        "model_type": "llama", "rope_parameters": YARN | {"rope_theta": 1e4}
    },
    "wrapped": {
        "model_type": "llava", "vision_config": {"model_type": "clip_vision_model"},
        "text_config": CONFIGS["llama"] | {"model_type": "llama", "rope_scaling": YARN},
    },
    "quantised": CONFIGS["qwen3"] | {
        "model_type": "qwen3", "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "packed": CONFIGS["mistral"] | {
        "model_type": "mistral", "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
            "checkpoint_format": "gptq",
        },
    },
    "compressed": CONFIGS["llama"] | {
        "model_type": "llama", "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": 16, "dynamic": False}}},
        },
    },
    "layered": CONFIGS["gemma3_text"] | {
        "model_type": "gemma3_text", "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
}  # fmt: skip
CONFIGURATIONS = {name: {"model_type": name} | CONFIGS[name] for name in CONFIGS} | MORE
GENERATION = {
    "eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 1, "do_sample": True,
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05,
    "stop_strings": ["</s>"], "max_length": 64, "transformers_version": "5.0",
}  # fmt: skip
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [
        {"id": 5, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True},
    ],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "  +"}, "content": " "}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{L}+| "}, "behavior": "Isolated",
         "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
         "use_regex": False}]},
    "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                       "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
              "byte_fallback": False, "ignore_merges": False,
              "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, "merges": ["a b", "ab c"]},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>"},
    "added_tokens_decoder": {"256": {"content": "<s>", "special": True},
                             "257": {"content": "</s>", "special": True}},
    "add_prefix_space": False, "model_max_length": 64, "clean_up_tokenization_spaces": False,
    "chat_template": "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}{% endfor %}",
}  # fmt: skip
TEMPLATES = (
    SETTINGS["chat_template"],
    "{%- set ns = namespace(found=false) -%}{%- for message in messages -%}{%- if message.role == "
    "'user' and not ns.found -%}{%- set ns.found = true -%}{%- endif -%}{{ bos_token ~ message."
    "content.split('</think>')[-1] }}{%- else -%}{%- break -%}{%- endfor -%}",
    "{%- macro m(x, n=2) -%}{{ x | tojson(indent=n) }}{%- endmacro -%}{{ m(messages[:-1]) }}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
)
PIECES = (
    "messages", "range(10**9)", "'a' * 10**11", "''.__class__", "cycler.__init__.__globals__",
    "lipsum", "joiner", "|attr('__class__')", "|format", "|map(attribute='x.y')", "|tojson",
    f"{{% include '/etc/{BAIT}' %}}", f"{{% import '{BAIT}' as x %}}", "{% raw %}", "{%", "%}",
    "{{", "}}", "{#", "''.join", "|join", "~", "[::-1]", "(10**10)**10",
    "raise_exception('\x1b[2J')",
    "strftime_now('%s' * 99)", "namespace(__class__=1)", "{% for x in range(99999) %}", "dict()",
    "{% extends bos_token %}", "|replace('', 'aaaa')", "|center(10**11)", "|sum", "loop", "self",
)  # fmt: skip
Reading = Generator[None, None, str]
"""Writes files, yields, and reads them: what came of it."""
FACTS = Facts("llama", vocab_size=97, eos_token_id=1)


def _written(folder: Path, file: str, content: Any) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / file).write_bytes(data)


def config(folder: Path, rng: random.Random) -> Reading:
    """`config.json`, through to the configuration object, for a share to the model and states."""
    name = rng.choice(list(CONFIGURATIONS))
    text, kind = mutated(CONFIGURATIONS[name], rng)
    _written(folder, "config.json", text)
    scaling = RopeScaling("yarn", 4.0) if rng.random() < 0.1 else None
    yield
    raw, read = read_config(folder, scaling)
    built = stock_config(read)
    facts = completed(read, built)
    if scaling is None:
        raw = _language_model(raw)
        wrong = _unlike(raw, built, read.published) or unlike_sections(raw, built, read)
        if wrong:
            return wrong
    if kind == "executable" and scaling is None and plain(built) != _unmutated(name):
        return "executable keys change the configuration"
    if facts.num_hidden_layers is None or facts.num_hidden_layers <= 4:
        draw = rng.random()
        if draw < BUILT:
            model: Any = stock_model(read)
            if BAIT in repr(model.config.to_dict().get("_attn_implementation")):
                return "an implementation of the file is chosen"
            if draw < FOUND:
                discover(model)
    return "read"


def plain(built: Any) -> str:
    """A configuration object as text, with its class."""
    return json.dumps([type(built).__name__, built.to_dict()], default=str, sort_keys=True)


@cache
def _unmutated(name: str) -> str:
    from dsc.frontends.stock import clean

    return plain(stock_config(clean(CONFIGURATIONS[name])))


ROPE = (
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
)  # fmt: skip
SAYS_ELSEWHERE = ("rope_parameters", "rope_scaling", "quantization_config", "dtype", "model_type")


def _language_model(raw: dict[str, Any]) -> dict[str, Any]:
    """What a file says of the language model, which may be a section."""
    for tower in ("text_config", "language_config", "llm_config"):
        section = raw.get(tower)
        if isinstance(section, Mapping) and isinstance(section.get("model_type"), str):
            above = ("dtype", "torch_dtype", "quantization_config")
            raw = {k: raw[k] for k in above if raw.get(k) is not None} | dict(section)
    return raw


def _unlike(raw: Mapping[str, Any], built: Any, published: str) -> str:
    """Where a configuration object holds another value than the file gives to a field of it."""
    held = type(built).__dataclass_fields__
    names = getattr(built, "attribute_map", {})
    for key, value in raw.items():
        if key not in held or value is None or key in SAYS_ELSEWHERE or key in names:
            continue
        if isinstance(value, dict) or value == []:
            continue
        found = getattr(built, key, None)
        same = found == value or (isinstance(found, tuple) and list(found) == value)
        if not same or (isinstance(value, bool) is not isinstance(found, bool)):
            return f"{published}.{key}: the file says {value!r:.40}, the model {found!r:.40}"
    return ""


def unlike_sections(raw: Mapping[str, Any], built: Any, read: StockConfig) -> str:
    """Where the model's type, rope, element type or stored form are not what the file says."""
    kind = CONFIG_MAPPING[MEMBERS.get(raw["model_type"], raw["model_type"])]
    if type(built) is not kind:
        return f"{raw['model_type']!r:.60} is read as {kind.__name__}"
    if (raw.get("dtype") or raw.get("torch_dtype") or None) != read.dtype:
        return f"dtype is read as {read.dtype}"
    said, held = raw.get("quantization_config"), read.facts.quantization_config
    if (said is None) is not (held is None):
        return f"quantization_config {said!r:.200} is read as {held!r:.200}"
    if held is not None and (wrong := _unlike_stored(said, held)):
        return wrong
    found = getattr(built, "rope_parameters", None)
    if not isinstance(found, dict):
        return ""
    section = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = raw.get("rope_theta")
    if theta is not None and "rope_theta" in found and "rope_theta" not in section:
        section = {**section, "rope_theta": theta}
    if not section:
        return ""  # the class's own
    return _unlike_rope(section, found, "original_max_position_embeddings" in raw)


def _unlike_rope(section: Any, found: Mapping[str, Any], stretched: bool) -> str:
    """Where a rope section is read as another. `stretched`: its first reach is told elsewhere."""
    if not isinstance(section, Mapping):
        return f"a rope section is {section!r:.60}"
    kind = section.get("rope_type", section.get("type", "default"))
    for key, value in section.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            if wrong := _unlike_rope(value, found[key], stretched):
                return f"{key}: {wrong}"
        is_plain = kind == "default" and not key.startswith(("rope_", "partial"))
        elsewhere = stretched and key == "original_max_position_embeddings"
        if key not in ROPE or value is None or is_plain or elsewhere:
            continue
        same = found.get(key) == value and isinstance(found[key], bool) is isinstance(value, bool)
        if not same:
            return f"{key} of rope: the file says {value!r:.40}, the model {found.get(key)!r:.40}"
    return "" if found.get("rope_type", kind) == kind else f"rope is read as {found!r:.200}"


def _unlike_stored(said: Any, held: QuantizationConfig) -> str:
    """Where weights are read as stored in another form than the file says."""
    differs = f"quantization_config {said!r:.300} is read as {held!r:.300}"
    method = said.get("quant_method")
    if method == "fp8":
        names = ("weight_block_size", "fmt", "activation_scheme", "scale_fmt")
        told = all(said[n] == getattr(held, n) for n in names if said.get(n) is not None)
        return "" if told and held.quant_method == "fp8" else differs
    if method == "gptq":
        size = said.get("group_size")
        sizes = {-1 if i.strategy == "channel" else i.group_size for i in held.integers}
        told = {i.bits for i in held.integers} == {said["bits"]} and sizes == {size}
        return "" if told else differs
    if method == "compressed-tensors":
        groups = [g["weights"] for g in said["config_groups"].values()]
        bits = {g["num_bits"] for g in groups if g.get("type", "int") == "int"}
        return "" if {i.bits for i in held.integers} == bits else differs
    return ""


def generation(folder: Path, rng: random.Random) -> Reading:
    """`generation_config.json`."""
    text, kind = mutated(GENERATION, rng)
    _written(folder, "generation_config.json", text)
    yield
    kept, notes = load_generation(folder, FACTS)
    if kind == "executable":
        _written(folder, "generation_config.json", GENERATION)
        if kept != load_generation(folder, FACTS)[0]:
            return "executable keys change the settings"
    return next(filter(None, map(unprintable, notes)), "") or "read"


def tokenizer(folder: Path, rng: random.Random) -> Reading:
    """`tokenizer.json`, or what `tokenizer_config.json` says of vocabularies and ranks."""
    way = rng.randrange(3)
    if way == 0:
        _written(folder, "tokenizer.json", mutated(TOKENIZER, rng)[0])
    else:
        ranks = [way == 1, rng.random() < 0.5]
        named = SETTINGS | ({"tokenizer_class": "TikTokenTokenizer"} if way == 1 else {})
        _written(folder, "tokenizer_config.json", mutated(named, rng)[0] if ranks[1] else named)
        _written(folder, "config.json", CONFIGURATIONS["gpt2"])
        if ranks[0]:
            _written(folder, "tiktoken.model", _RANKS if ranks[1] else damaged(_RANKS, rng))
        else:
            vocabulary: Any = TOKENIZER["model"]["vocab"]
            merges = b"#version: 0.2\na b\nab c\n"
            _written(folder, "vocab.json", vocabulary if ranks[1] else mutated(vocabulary, rng)[0])
            _written(folder, "merges.txt", merges if ranks[1] else damaged(merges, rng))
    yield
    _, note = find_tokenizer(folder)
    return unprintable(note) or "read"


def _ranks() -> bytes:
    import base64

    lines = [b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    return b"\n".join(lines) + b"\n"


_RANKS = _ranks()


def settings(folder: Path, rng: random.Random) -> Reading:
    """Where a chat template is found: `tokenizer_config.json` and those beside it."""
    file = rng.choice(("tokenizer_config.json", "chat_template.json", "special_tokens_map.json"))
    listed = {
        "chat_template": [{"name": "default", "template": "x"}, {"name": "t", "template": ""}]
    }
    _written(folder, "tokenizer_config.json", SETTINGS)
    _written(folder, file, mutated(SETTINGS | (listed if rng.random() < 0.5 else {}), rng)[0])
    if rng.random() < 0.1:
        _written(folder, "chat_template.jinja", damaged(TEMPLATES[1].encode(), rng))
    yield
    found, note = find_chat(folder)
    if found is not None:
        chat_template.parse_chat(found)
    return unprintable(note) or "read"


def template(folder: Path, rng: random.Random) -> Reading:
    """A chat template as its process runs it, which is ended where it takes too long."""
    text = rng.choice(TEMPLATES)
    for _ in range(rng.randrange(1, 5)):
        if rng.random() < 0.6:  # between two tags, or as the value of one, so that more is run
            place = rng.choice([0, *(end.end() for end in re.finditer(r"[%}]}", text)), len(text)])
            piece = rng.choice(PIECES)
            forms = ("{{{{ {} }}}}", "{{{{ messages{} }}}}", "{{% set x = {} %}}")
            put = rng.choice(forms).format(piece)
            text = text[:place] + put + text[place:]
        else:
            put = rng.choice((*PIECES, f"{{{{ {rng.choice(PIECES)} }}}}", rng.choice(TEXTS)))
            place = rng.randrange(len(text))
            text = text[:place] + put + text[place + rng.choice((0, 0, 1, 5)) :]
    text = text.encode("utf-8", "replace").decode()
    values = {"messages": TALK, "bos_token": f"/etc/{BAIT}", "add_generation_prompt": True}

    def stop(*_: object) -> None:
        raise TimeoutError

    yield
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 0.5)
    try:
        told = template_process.answer(json.dumps({"template": text, "values": values}).encode())
    except TimeoutError:
        return "bounded"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if "error" in told:
        return unprintable(str(DscError(told["error"]))) or "refused"  # as a user is told
    return "read" if len(told["text"]) <= template_process.MAX_TEXT else "too long a text"


def safetensors(folder: Path, rng: random.Random) -> Reading:
    """The header of a file, or an index of two."""
    shapes = {"a": [2, 3], "b": [4], "c": []}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    indexed = rng.random() < 0.4
    text = json.dumps(header).encode() if indexed else mutated(header, rng)[0]
    length = (
        len(text) if rng.random() < 0.9 else rng.choice((0, 1, 1 << 20, 1 << 63, len(text) - 1))
    )
    file = "one.safetensors" if indexed else "model.safetensors"
    whole = length.to_bytes(8, "little") + text + bytes(range(end))
    _written(folder, file, damaged(whole, rng) if rng.random() < 0.1 else whole)
    if indexed:
        index = {"metadata": {"total_size": end}, "weight_map": dict.fromkeys(shapes, file)}
        _written(folder, "model.safetensors.index.json", mutated(index, rng)[0])
    yield
    source = open_safetensors(folder)
    for key in source.types:
        array = source.array(key)
        if array.nbytes > len(whole):
            return "more bytes than the file has"
    return "read"


def cached(folder: Path, rng: random.Random) -> Reading:
    """The Hub's cache: refs, snapshots and links, some to a file outside."""
    outside = folder.parent / f"{BAIT}.json"
    outside.write_text(json.dumps(CONFIGURATIONS["llama"]))
    repository, commit = folder / "models--org--name", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for each in (repository / "refs", repository / "blobs", snapshot):
        each.mkdir(parents=True)
    files = {
        "config.json": CONFIGURATIONS["llama"], "generation_config.json": GENERATION,
        "tokenizer.json": TOKENIZER, "chat_template.json": SETTINGS,
    }  # fmt: skip
    for number, (file, tree) in enumerate(files.items()):
        _written(repository / "blobs", f"blob{number}", tree)
        target = rng.choice((f"../../blobs/blob{number}",) * 8 + (
            str(outside), f"../../../../{outside.name}", "absent", "/dev/zero",
            "/proc/self/environ",
            file, "../..", "../../blobs"))  # fmt: skip
        (snapshot / file).symlink_to(target)
    ref = commit.encode() + rng.choice((b"", b"", b"\n"))
    odd = (
        b"../..",
        b"\xff",
        b"/",
        b".",
        b"",
        b"main",
        b"\x1b[2J",
        b"a" * 9999,
        b"x\0y",
        b"\n" * 99,
    )
    (repository / "refs" / "main").write_bytes(rng.choice((ref, ref, ref, *odd, damaged(ref, rng))))
    if rng.random() < 0.1:
        (repository / "snapshots" / "other").symlink_to(folder.parent)
    revision = rng.choice((None, None, "main", commit, "../main", "other", "a/../../b", "\x1b[2J"))
    yield
    place, _ = hub.located(repository, revision)
    if folder.resolve() not in place.resolve().parents:
        return f"a folder outside: {place}"
    for reader in (read_config, find_chat, find_tokenizer, lambda p: load_generation(p, FACTS)):
        try:
            reader(place)
        except DscError as problem:
            if wrong := unprintable(str(problem)):
                return wrong
    return "read"


READERS: dict[str, Callable[[Path, random.Random], Reading]] = {
    each.__name__: each
    for each in (config, generation, tokenizer, settings, template, safetensors, cached)
}
NAMES = tuple(READERS)


def prepare(folder: Path) -> None:
    """Read valid files, so that what readers import is imported. Leaves them in the folder."""
    for name in CONFIGURATIONS:
        _unmutated(name)
    _written(folder, "config.json", CONFIGURATIONS["llama"])
    read = read_config(folder)[1]
    discover(stock_model(read))
    _written(folder, "tokenizer.json", TOKENIZER)
    find_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    _written(folder, "tokenizer_config.json", SETTINGS | {"tokenizer_class": "TikTokenTokenizer"})
    _written(folder, "tiktoken.model", _RANKS)
    find_tokenizer(folder)
    (folder / "tiktoken.model").unlink()
    _written(folder, "tokenizer_config.json", SETTINGS)
    _written(folder, "vocab.json", TOKENIZER["model"]["vocab"])
    _written(folder, "merges.txt", b"#version: 0.2\na b\nab c\n")
    find_tokenizer(folder)
    find_chat(folder)
    values = {"messages": TALK, "add_generation_prompt": True}
    for text in TEMPLATES:
        template_process.answer(json.dumps({"template": text, "values": values}).encode())
