"""Where models and data sets come from; the Hub is a small server on this machine."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from unicomp import builtin, hub
from unicomp.errors import CheckpointError, UnicompError, UnsupportedError

COMMIT = "a" * 40
OTHER = "b" * 40
INDEX = json.dumps({"weight_map": {"x": "part-1.safetensors", "y": "part-2.safetensors"}})

# repository -> revision -> (commit, files)
MODELS: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "org/single": {
        "main": (
            COMMIT,
            {
                "config.json": '{"v": 1}',
                "model.safetensors": "weights",
                "tokenizer.json": "{}",
                "tokenizer.model": "t",
                "merges.txt": "a b",
                "chat_template.jinja": "hi",
                "LICENSE": "free",
                "README.md": "no",
                "pytorch_model.bin": "pickle",
                "model.fp16.safetensors": "variant",
                "modeling.py": "code",
                "onnx/model.safetensors": "elsewhere",
                "original/params.json": "elsewhere",
            },
        ),
        "v2": (OTHER, {"config.json": '{"v": 2}', "model.safetensors": "new"}),
    },
    "org/sharded": {
        "main": (
            COMMIT,
            {
                "config.json": "{}",
                "model.safetensors.index.json": INDEX,
                "part-1.safetensors": "one",
                "part-2.safetensors": "two",
                "part-3.safetensors": "not in the index",
            },
        )
    },
    "org/pickle": {"main": (COMMIT, {"config.json": "{}", "pytorch_model.bin": "pickle"})},
}
PARQUET = "refs/convert/parquet"
DATASETS: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "org/converted": {
        "main": (COMMIT, {"data.csv": "x"}),
        PARQUET: (
            OTHER,
            {
                "default/train/0001.parquet": "two",
                "default/train/0000.parquet": "one",
                "default/test/0000.parquet": "test",
                "extra/only/0000.parquet": "extra",
                ".gitattributes": "",
            },
        ),
    },
    "org/plain": {
        "main": (
            COMMIT,
            {"data/train-00000-of-00001.jsonl": "{}", "data/test.jsonl": "{}", "README.md": "x"},
        )
    },
}


class Hub(BaseHTTPRequestHandler):
    """The few addresses that huggingface_hub asks for."""

    asked: ClassVar[list[str]] = []
    fetched: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].replace("%2F", "/")
        self.asked.append(path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        raw = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        found = api or raw
        if found is None:
            return self.answer(404, {"error": path})
        kind = DATASETS if found[1] in ("datasets", "datasets/") else MODELS
        repository = kind.get(found[2])
        if repository is None:
            return self.answer(401, {}, {"X-Error-Code": "RepoNotFound"})
        if found[2] == "org/gated":
            return self.answer(403, {}, {"X-Error-Code": "GatedRepo"})
        revision = (api[4] if api else raw[3] if raw else None) or "main"
        if revision not in repository:
            revision = next((r for r, (sha, _) in repository.items() if sha == revision), "")
        if not revision:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        sha, files = repository[revision]
        if raw:
            return self.file(sha, raw[4], files)
        sizes = [{"rfilename": n, "size": len(t)} for n, t in files.items()]
        if api and api[3] == "tree":
            entries = [
                {"type": "file", "path": n, "size": len(t), "oid": sha1(t.encode()).hexdigest()}
                for n, t in files.items()
            ]
            return self.answer(200, entries)
        return self.answer(200, {"id": found[2], "sha": sha, "siblings": sizes})

    def file(self, sha: str, name: str, files: dict[str, str]) -> None:
        if name not in files:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        if self.command == "GET":
            self.fetched.append(name)
        etag = f'"{sha1(files[name].encode()).hexdigest()}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
        return self.answer(200, files[name], headers)

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a Hub with `MODELS` and `DATASETS`."""
    Hub.asked, Hub.fetched = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


SCRIPT = """
import json, sys
from unicomp import hub
from unicomp.errors import UnicompError
for call in sys.argv[1:]:
    name, _, word = call.partition(" ")
    try:
        found = getattr(hub, name)(word)
        if name == "resolve":
            files = sorted(p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*"))
            answer = {"id": found.id, "revision": found.revision, "files": files}
        else:
            answer = {"texts": [path.read_text() for path in found]}
    except UnicompError as error:
        answer = {"error": error.message, "hint": error.hint}
    print(json.dumps(answer))
"""


def ask(home: Path, *calls: str, **environment: str) -> list[dict[str, Any]]:
    """Call functions of `hub` in a process of its own: the settings are read once in a process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, *calls],
        env=kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def test_builtin_models() -> None:
    found = hub.resolve("builtin:tinyworld")
    assert found == hub.Source(builtin.model("tinyworld"), "builtin:tinyworld", None)
    with pytest.raises(UnsupportedError, match="unknown embedded model: `nope`"):
        hub.resolve("builtin:nope")


def test_a_folder_is_known_by_its_own_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.resolve(str(tmp_path / "org" / "name")).id == "name"
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == hub.Source(Path("org/name"), "name", None)
    monkeypatch.chdir(tmp_path / "org" / "name")
    assert hub.resolve(".").id == "name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org").folder == tmp_path / "org"


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for name in ("absent", "./org/name", "a/b/c", "/absent/folder", "~nobody/x", "org/name@"):
        with pytest.raises(CheckpointError) as caught:
            hub.resolve(name)
        assert "no such folder" in caught.value.message
        assert caught.value.hint
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve("file")
    with pytest.raises(CheckpointError, match="name is empty"):
        hub.resolve("")


def test_fetch_a_model(tmp_path: Path, server: str) -> None:
    first, second, sharded, again = ask(
        tmp_path,
        "resolve org/single",
        "resolve org/single@v2",
        "resolve org/sharded",
        "resolve org/single",
        HF_ENDPOINT=server,
    )
    wanted = "LICENSE chat_template.jinja config.json merges.txt model.safetensors tokenizer.json"
    assert first == {
        "id": "org/single",
        "revision": COMMIT,
        "files": [*wanted.split(), "tokenizer.model"],
    }
    assert second["revision"] == OTHER
    assert second["files"] == ["config.json", "model.safetensors"]
    assert [f for f in sharded["files"] if f.endswith(".safetensors")] == [
        "part-1.safetensors",
        "part-2.safetensors",
    ]
    assert again == first
    assert len(Hub.fetched) == len(set(Hub.fetched)) + 3  # v2 has two of the names, sharded one
    assert not [name for name in Hub.fetched if name.endswith((".bin", ".py"))]

    asked = len(Hub.asked)
    offline, absent, old = ask(
        tmp_path,
        "resolve org/single",
        "resolve org/other",
        "resolve org/single@v2",
        HF_ENDPOINT=server,
        HF_HUB_OFFLINE="1",
    )
    assert offline == first
    assert old["revision"] == OTHER
    assert "no folder `org/other` here" in absent["error"]
    assert "HF_HUB_OFFLINE" in absent["hint"]
    assert len(Hub.asked) == asked


def test_what_the_hub_refuses(tmp_path: Path, server: str) -> None:
    absent, revision, pickle, malformed = ask(
        tmp_path,
        "resolve org/absent",
        "resolve org/single@v9",
        "resolve org/pickle",
        "resolve org/a--b",
        HF_ENDPOINT=server,
    )
    assert "no model `org/absent` on the Hub" in absent["error"]
    assert revision["error"] == "`org/single` has no revision `v9`"
    assert "has no safetensors weights" in pickle["error"]
    assert "never loaded" in pickle["hint"]
    assert "no Hub id" in malformed["error"]
    assert "pytorch_model.bin" not in Hub.fetched


def test_nobody_answers(tmp_path: Path) -> None:
    model, data = ask(
        tmp_path,
        "resolve org/single",
        "dataset_files hub:org/plain",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    for answer in (model, data):
        assert "cannot be" in answer["error"]
        assert "http://127.0.0.1:9" in answer["hint"]


def test_fetch_a_data_set(tmp_path: Path, server: str) -> None:
    calls = [
        "dataset_files hub:org/converted",
        "dataset_files hub:org/converted/test",
        "dataset_files hub:org/converted:extra",
        "dataset_files hub:org/plain",
        "dataset_files hub:org/converted/absent",
        "dataset_files hub:org/converted:absent",
        "dataset_files hub:org/plain:fr/test",
        "dataset_files hub:org/absent",
        "dataset_files hub:absent",
    ]
    answers = ask(tmp_path, *calls, HF_ENDPOINT=server)
    assert [answer.get("texts") for answer in answers[:4]] == [
        ["one", "two"],
        ["test"],
        ["extra"],
        ["{}"],
    ]
    errors = [answer["error"] for answer in answers[4:]]
    assert errors == [
        "`hub:org/converted/absent`: no split `absent`",
        "`hub:org/converted:absent`: no config `absent`",
        "`hub:org/plain:fr/test`: no data file of `fr` and `test`",
        "no data set `org/absent` on the Hub",
        "not a data set: `hub:absent`",
    ]
    assert "`test`, `train`" in answers[4]["hint"]
    assert "`default`, `extra`" in answers[5]["hint"]
    offline = ask(tmp_path, *calls[:4], HF_ENDPOINT=server, HF_HUB_OFFLINE="1")
    assert offline == answers[:4]


def test_a_data_set_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"default/train/0000.parquet": hub.DATA_LIMIT + 1}
    monkeypatch.setattr(hub, "_list_dataset", lambda name, revision: (files, None))
    with pytest.raises(UnicompError, match=r"is 8\.00 GB in 1 files, over the limit"):
        hub.dataset_files("hub:org/name")
