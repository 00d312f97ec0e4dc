"""Models by name: a Hub on the loopback is asked for what is read, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.file_download
import pytest

from dsc.errors import CheckpointError, DscError, FileError, UsageError
from dsc.frontends.hub import located, snapshot_of
from dsc.frontends.load import load_program
from dsc.ir.types import DType
from dsc.models.configs import TINY_CHECKPOINT

NAME = "org/Tiny-V3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}


class Hub:
    """A repository, what was asked of it, and where it breaks off."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {
            "config.json": b"{}",
            "modeling_x.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "consolidated.safetensors": b"the same once more",
            "model.safetensors.index.json": json.dumps(INDEX).encode(),
            **{name: name.encode() * 500 for name in SHARDS},
        }
        self.asked: list[tuple[str, str, str | None]] = []
        self.breaks_in: dict[str, int] = {}
        self.claims: dict[str, int] = {}
        self.status = 200
        self.sha = COMMIT

    def got(self) -> list[str]:
        """The names of files whose bytes were asked for, in order."""
        found = [path.partition("/resolve/")[2] for verb, path, _ in self.asked if verb == "GET"]
        return [path.partition("/")[2] for path in found if path]


class Answers(BaseHTTPRequestHandler):
    """Speaks as much of the Hub's protocol as a download takes."""

    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if hub.status != 200:
            return self._send(hub.status, b"")
        if path.startswith(f"/api/models/{NAME}"):
            sizes = {name: hub.claims.get(name, len(data)) for name, data in hub.files.items()}
            listed = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            facts = {"id": NAME, "sha": hub.sha, "siblings": listed}
            return self._send(200, json.dumps(facts).encode(), "application/json")
        file = path.partition("/resolve/")[2].partition("/")[2]
        if not path.startswith(f"/{NAME}/resolve/") or file not in hub.files:
            return self._send(404, b"")
        return self._send_file(file, hub.files[file])

    def _send_file(self, file: str, data: bytes) -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            end = self.hub.breaks_in.pop(file, len(data))
            self.wfile.write(data[start:end])

    def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that answers, and an empty cache."""
    found = Hub()
    answers = type("TheseAnswers", (Answers,), {"hub": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)  # type: ignore[attr-defined]
    yield found
    server.shutdown()
    server.server_close()


def test_what_is_read_is_downloaded_once_and_found_again_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    folder, notes = located(NAME, progress=lambda *step: told.append(step))
    assert sorted(each.name for each in folder.iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", *SHARDS]
    )
    assert all((folder / name).read_bytes() == hub.files[name] for name in SHARDS)
    assert notes == []
    total = sum(len(hub.files[name]) for name in SHARDS)
    assert told[-1] == (f"downloading: {SHARDS[1]}", total, total)
    hub.asked.clear()
    assert located(NAME)[0] == folder
    assert hub.got() == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert located(NAME) == (folder, [])
    assert located(NAME, COMMIT) == (folder, [])
    assert hub.asked == []
    assert located(folder.parent.parent)[0] == folder
    assert snapshot_of(folder.parent.parent, COMMIT) == folder


def test_a_download_goes_on_where_it_was_interrupted(hub: Hub) -> None:
    """A connection that breaks is taken up by a range; whole files are not asked for again."""
    hub.breaks_in[SHARDS[0]] = 4000

    def interrupt(what: str, done: int, total: int) -> None:
        if what == f"downloading: {SHARDS[1]}" and done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        located(NAME, progress=interrupt)
    ranges = [said for verb, path, said in hub.asked if verb == "GET" and SHARDS[0] in path]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").rstrip("-")) > 0
    hub.asked.clear()
    folder, _ = located(NAME)
    assert hub.got() == [SHARDS[1]]
    assert all((folder / name).read_bytes() == hub.files[name] for name in SHARDS)


def test_a_model_compiles_by_its_name(hub: Hub) -> None:
    hub.files = {each.name: each.read_bytes() for each in TINY_CHECKPOINT.iterdir()}
    loaded = load_program(NAME)
    assert loaded.program.name == "Tiny-V3"
    assert loaded.source.endswith(f"snapshots/{COMMIT}")
    assert loaded.program.meta["generation"] == {
        "eos_token_id": [1], "bos_token_id": 0, "do_sample": False,
    }  # fmt: skip
    assert "README.md" not in hub.got()


def test_without_values_no_weights_are_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {each.name: each.read_bytes() for each in TINY_CHECKPOINT.iterdir()}
    with_values = load_program(str(TINY_CHECKPOINT), weights="none").program
    loaded = load_program(NAME, weights="none", dtype=DType.bf16)
    assert not [file for file in hub.got() if file.endswith(".safetensors")]
    assert not loaded.program.has_weights
    assert loaded.program.weight_types() == with_values.weight_types()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_program(NAME, weights="none").program.weight_types() == with_values.weight_types()
    with pytest.raises(FileError, match=r"has not all of .*: no weights"):
        load_program(NAME)


@pytest.mark.parametrize(
    "name",
    [
        "../etc", "a/../b", "a/b/c", "a//b", "/a/b", "a b/c", "a/b\n", "a\x00/b", "a--b/c",
        "a/b.py", "\u0430/b", "a/" + "b" * 96, "-a/b", "a/.b", "a/b?x=1", "a/b#c", "https://h/a",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused_without_a_request(hub: Hub, name: str) -> None:
    with pytest.raises(UsageError, match="no model at"):
        load_program(name)
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["../x", "a/../../b", "", "-x", "a b", "a?b", "/x", "x" * 300])
def test_what_is_no_revision_is_refused_without_a_request(hub: Hub, revision: str) -> None:
    with pytest.raises(UsageError, match="is no revision"):
        located(NAME, revision)
    assert hub.asked == []


def test_a_revision_is_of_a_model_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a revision is of a model on the Hub"):
        located(tmp_path, "main")


def test_what_the_hub_has_not_is_said(hub: Hub) -> None:
    with pytest.raises(UsageError, match=r"no folder 'org/Other' here, and the Hub has no model"):
        located("org/Other")
    del hub.files[SHARDS[1]]
    with pytest.raises(CheckpointError, match=f"names '{SHARDS[1]}', which is missing"):
        located(NAME)
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b""}
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, which is not read"):
        located(NAME)
    hub.files = {"README.md": b""}
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        located(NAME)
    hub.sha = "main"
    with pytest.raises(CheckpointError, match="names no commit"):
        located(NAME)
    hub.status = 403
    with pytest.raises(FileError, match=r"answers 403, and the cache has not all"):
        located(NAME)


@pytest.mark.parametrize("lies", [False, True])
def test_a_file_beyond_its_bound_is_not_written(hub: Hub, tmp_path: Path, lies: bool) -> None:
    """By the size that is announced before it is asked for, else as its bytes come."""
    hub.files["config.json"] = b" " * (5 << 20)
    hub.claims = {"config.json": 2} if lies else {}
    with pytest.raises(CheckpointError, match="bytes or more, where such a file may have 4194304"):
        located(NAME)
    assert lies == bool(hub.got())
    held = [each for each in (tmp_path / "cache").rglob("blobs/*") if each.is_file()]
    assert held == []


def test_off_line_what_the_cache_lacks_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = located(NAME, "main")
    hub.status = 500
    again, notes = located(NAME)
    assert again == folder
    assert "answers 500: org/Tiny-V3 is what the cache has of it" in notes[0]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match=r"no folder 'org/No' here, HF_HUB_OFFLINE is set, and"):
        located("org/No")
    with pytest.raises(FileError, match=r"org/Tiny-V3 at v2 is not in the cache"):
        located(NAME, "v2")
    (folder / SHARDS[0]).unlink()
    with pytest.raises(FileError, match=f"has not all of {NAME}: the index names '{SHARDS[0]}'"):
        located(NAME)


def test_a_repository_in_the_cache_tells_its_snapshots(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--m"
    for commit in ("aaaa", "bbbb"):
        (repository / "snapshots" / commit).mkdir(parents=True)
    with pytest.raises(UsageError, match="no snapshot of revision main"):
        located(repository)
    assert located(repository, "bbbb")[0].name == "bbbb"
    shutil.rmtree(repository / "snapshots" / "aaaa")
    assert located(repository)[0].name == "bbbb"
    shutil.rmtree(repository / "snapshots" / "bbbb")
    with pytest.raises(DscError, match="no snapshot"):
        located(repository)
