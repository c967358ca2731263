"""Pushing to a small server that speaks the Hub's calls, with huggingface_hub on the other end."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from unicomp.cli.main import exit_code
from unicomp.errors import UnicompError
from unicomp.recipes.publish import card_fields
from unicomp.recipes.publish.push import check

TOKEN = "hf_" + "PlantedTokenThatNobodyMaySee"
LARGE = 10_000  # bytes from which the server wants a file by LFS

# Every command in one process: HF_ENDPOINT is read when the client is first imported.
DRIVER = """
import contextlib, io, json, sys
from unicomp.cli.main import exit_code
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(words)
    print("DONE " + json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Hub(ThreadingHTTPServer):
    """What the Hub would hold: files by repository, LFS objects by hash, and who asked what.

    Repositories named `e401` and so on answer with that status; `cut` breaks once at the second
    large file, `gone` drops every connection, `hangs` keeps them and says nothing.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Speaker)
        self.calls: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.puts = 0
        self.broken = False
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Speaker(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        hub, data = self.server, self.body()
        hub.calls.append(("PUT", self.path))
        hub.puts += 1
        if "cut" in self.path and hub.puts == 2 and not hub.broken:
            hub.broken = True
            return self.answer({"error": "cut"}, 400)
        digest = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != digest:
            return self.answer({"error": "other bytes"}, 400)
        hub.objects[digest] = data
        return self.answer({})

    def do_GET(self) -> None:
        self.server.calls.append(("GET", self.path))
        self.answer({"error": "absent"}, 404)

    def do_POST(self) -> None:
        hub, data = self.server, self.body()
        path = self.path.partition("?")[0]
        hub.calls.append(("POST", self.path))
        hub.tokens.add(str(self.headers.get("Authorization")))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            said = json.loads(data)
            name = f"{said.get('organization') or 'org'}/{said['name'].rpartition('/')[2]}"
            if name.startswith("org/e") and name != "org/e409":  # 409 here: it is there already
                return self.answer({"error": "no"}, int(name[5:]))
            if name == "org/gone":
                return self.connection.close()
            if name == "org/hangs":
                hub.over.wait(60)
                return self.connection.close()
            hub.private[name] = bool(said.get("private") or said.get("visibility") == "private")
            return self.answer({"url": f"{hub.url}/{name}"})
        if path.endswith("/objects/batch"):
            repo = path.removeprefix("/").partition(".git")[0]
            return self.answer({"transfer": "basic", "objects": self.batch(repo, data)})
        parts = path.split("/")
        repo = "/".join(parts[3:5])
        if parts[5] == "branch":
            return self.answer({})
        if parts[5] == "preupload":
            return self.answer({"files": [self.mode(own) for own in json.loads(data)["files"]]})
        if parts[5] == "commit":
            return self.commit(repo, data)
        return self.answer({"error": path}, 404)

    def mode(self, own: dict[str, Any]) -> dict[str, Any]:
        kind = "lfs" if own["size"] >= LARGE else "regular"
        return {"path": own["path"], "uploadMode": kind, "shouldIgnore": False}

    def batch(self, repo: str, data: bytes) -> list[dict[str, Any]]:
        found = []
        for own in json.loads(data)["objects"]:
            href = f"{self.server.url}/store/{repo}/{own['oid']}"
            actions = {"upload": {"href": href, "header": {}}}
            there = own["oid"] in self.server.objects
            found.append(own if there else own | {"actions": actions})
        return found

    def commit(self, repo: str, data: bytes) -> None:
        if repo == "org/e409":
            return self.answer({"error": "another commit came first"}, 409)
        files = self.server.files.setdefault(repo, {})
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/{repo}/commit/{'0' * 40}"
        pull = f"{self.server.url}/{repo}/discussions/1" if "create_pr" in self.path else None
        said = {"success": True, "commitUrl": url, "commitOid": "0" * 40}
        self.answer(said | ({"pullRequestUrl": pull} if pull else {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "out"
    words = ["--method", "rtn", "--bits", "4", "--group-size", "32", "--out", str(path)]
    assert exit_code(["quantize", "builtin:tinyworld", *words]) == 0
    return path


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def run(url: str, home: Path, *commands: list[str], **more: str) -> list[tuple[int, str, str]]:
    env = os.environ | more | {
        "HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        env=env, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("DONE ")]
    assert len(lines) == len(commands), done.stderr
    return [(own[0], own[1], own[2]) for own in map(json.loads, lines)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {own.name: own.read_bytes() for own in folder.iterdir()}


def test_files_arrive_and_an_interrupted_push_goes_on(
    folder: Path, hub: Hub, tmp_path: Path
) -> None:
    before = files_of(folder)
    (folder / ".note").write_text("of another tool")
    try:
        done = run(
            hub.url, tmp_path / "home",
            ["push", str(folder), "org/dry", "--dry-run", "--json"],
            ["push", str(folder), "org/model", "--private", "--revision", "w4", "--json"],
            ["push", str(folder), "org/model", "--create-pr", "--json"],
        )  # fmt: skip
        assert [code for code, _, _ in done] == [0, 0, 0], done
    finally:
        (folder / ".note").unlink()
    dry, sent, pull = (json.loads(out) for _, out, _ in done)
    assert dry["files"] == {name: len(data) for name, data in before.items()}
    assert (dry["sent"], sent["sent"]) == (False, True)
    assert hub.files["org/model"] == before
    assert "org/dry" not in hub.private
    assert hub.private["org/model"] is True
    assert any(path.endswith("/branch/w4") for _, path in hub.calls)
    assert pull["url"].endswith("/discussions/1")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert files_of(folder) == before

    hub.objects.clear()
    hub.puts = 0
    first, second = run(
        hub.url, tmp_path / "home",
        ["push", str(folder), "org/cut"], ["push", str(folder), "org/cut"],
    )  # fmt: skip
    assert first[0] == 1
    assert "hint: run the same command again" in first[2] or "hint: see" in first[2]
    assert second[0] == 0, second
    assert hub.files["org/cut"] == before
    puts = [path for kind, path in hub.calls if kind == "PUT" and "org/cut" in path]
    assert hub.broken
    large = sum(len(data) >= LARGE for data in before.values())
    assert large >= 2
    assert len(puts) == large + 1  # only the one that was cut went twice


def test_what_the_hub_refuses_is_said_in_two_lines(folder: Path, hub: Hub, tmp_path: Path) -> None:
    statuses = [401, 403, 404, 409, 500]
    names = [f"org/e{status}" for status in statuses] + ["org/gone", "no/id/at/all"]
    done = run(hub.url, tmp_path / "home", *[["push", str(folder), name] for name in names])
    for name, (code, out, err) in zip(names, done, strict=True):
        assert (code, out) == (1, ""), (name, err)
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 2, (name, err)
        assert lines[0].startswith(f"error: `{name}`")
        assert lines[1].startswith("hint: ")
    for status, (_, _, err) in zip(statuses, done, strict=False):
        assert f"answers {status}" in err
    assert "does not answer" in done[5][2]
    assert hub.files == {}


def test_a_hub_that_hangs_is_not_waited_for(folder: Path, hub: Hub, tmp_path: Path) -> None:
    ((code, out, err),) = run(
        hub.url, tmp_path / "home", ["push", str(folder), "org/hangs"], HF_HUB_DOWNLOAD_TIMEOUT="1"
    )
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "error: `org/hangs`: the Hub does not answer (ReadTimeout)",
        "hint: once it does, run the same command again: what arrived is not sent twice",
    ]


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder_that_verify_rejects_is_not_sent(folder: Path, tmp_path: Path) -> None:
    assert check(folder, "org/a", allow_failed_gates=False).failed == ()
    harmed = copy(folder, tmp_path)
    data = bytearray((harmed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (harmed / "model.safetensors").write_bytes(data)
    with pytest.raises(UnicompError, match="is not what its manifest says"):
        check(harmed, "org/a", allow_failed_gates=True)


@pytest.mark.parametrize("outcome", ["fail", "inconclusive", "pass"])
def test_gates_must_be_passed(outcome: str, folder: Path, tmp_path: Path) -> None:
    scored = copy(folder, tmp_path)
    report = {
        "schema": "unicomp.report/1", "model": {"id": "m"}, "baseline": None, "machine": {},
        "versions": {}, "seeds": {}, "scores": [],
        "gates": [{"gate": "fidelity/kl", "score": "fidelity/kl", "outcome": outcome}],
    }  # fmt: skip
    (scored / "report.json").write_text(json.dumps(report))
    if outcome == "pass":
        assert "report.json" in check(scored, "org/a", allow_failed_gates=False).files
        return
    with pytest.raises(UnicompError, match=f"1 gates are not passed: fidelity/kl: {outcome}"):
        check(scored, "org/a", allow_failed_gates=False)
    assert check(scored, "org/a", allow_failed_gates=True).failed


def test_the_card_is_what_the_hub_reads(folder: Path) -> None:
    from unicomp import manifest

    scores: list[dict[str, Any]] = [
        {"name": "accuracy/perplexity", "value": 5.25, "ci95": [5.0, 5.5], "n": 2000,
         "baseline": 5.0, "status": "measured"},
        {"name": "accuracy/blimp/acc", "value": 0.67, "ci95": None, "n": 100,
         "baseline": None, "status": "measured"},
        {"name": "fidelity/kl", "value": None, "status": "skipped"},
    ]  # fmt: skip
    made = manifest.read(folder)
    hubbed = made.model_copy(update={"source": made.source.model_copy(update={"id": "org/base"})})
    own = card_fields.fields(hubbed, {"scores": scores})
    text = card_fields.front(own)
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    assert (data.base_model, data.base_model_relation) == ("org/base", "quantized")
    assert data.tags == ["unicomp", "quantized"]
    results = {result.metric_name: result for result in data.eval_results or []}
    assert set(results) == {"accuracy/perplexity", "accuracy/blimp/acc"}
    first = results["accuracy/perplexity"]
    assert isinstance(first, EvalResult)
    assert first.metric_value == 5.25
    assert first.metric_args == {"ci95": [5.0, 5.5], "n": 2000, "baseline": 5.0}
    again = ModelCardData(**data.to_dict()) if not data.eval_results else data
    assert yaml.safe_load(again.to_yaml()) == yaml.safe_load(text.strip().strip("-"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (("tags:", "tagz:"), "`tags`: field required"),
        (("library_name: transformers", "library_name: mine"), "`library_name`"),
        (("---\n", ""), "does not start with metadata"),
        (("tags:", "model-index: [{name: x, results: []}]\ntags:"), "`model-index.0.results`"),
        (("tags:", "base_model: not an id\ntags:"), "`base_model`"),
        (("tags:", "widget: 1\ntags:"), "`widget`: extra inputs"),
    ],
)
def test_a_bad_card_is_refused(
    harm: tuple[str, str], said: str, folder: Path, tmp_path: Path
) -> None:
    card_fields.check(folder / "README.md")
    planted = copy(folder, tmp_path)
    text = (planted / "README.md").read_text("utf-8").replace(*harm, 1)
    (planted / "README.md").write_text(text)
    with pytest.raises(UnicompError, match="is no model card") as caught:
        check(planted, "org/a", allow_failed_gates=False)
    assert said in caught.value.message
