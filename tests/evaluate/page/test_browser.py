"""The pages in a real browser: nothing is fetched, nothing complains, everything fits a phone."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from unicomp.evaluate.page import comparison, scorecard, sheet
from unicomp.evaluate.scores import SCHEMA, Report, Score, Subject, measured, missing
from unicomp.evaluate.verdicts.compare import compare
from unicomp.evaluate.verdicts.gates import Gate, decide

PHONE, DESK = 375, 1280
SECONDS = 60.0  # that the browser may take to answer
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(autouse=True)
def browser() -> str:
    """Return the browser; without one, fail where CI is set."""
    if BROWSER is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium: install Debian's package `chromium`")
        pytest.skip("no chromium")
    return BROWSER


class Tab:
    """A page in the browser, by the DevTools protocol over two pipes."""

    def __init__(self, to: int, source: int) -> None:
        self.to, self.source, self.rest, self.count = to, source, b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.count:
                assert "error" not in found, found
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def wait(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def value(self, script: str) -> Any:
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"][
            "value"
        ]

    def open(self, path: Path, width: int, *, dark: bool = False) -> None:
        self.events.clear()
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width == PHONE,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def picture(self, path: Path) -> None:
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(own) for own in self.events if own.get("method") in kinds]

    def requests(self) -> list[str]:
        return [
            own["params"]["request"]["url"]
            for own in self.events
            if own.get("method") == "Network.requestWillBeSent"
        ]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            assert time.monotonic() < end, "the browser does not answer"
            more = os.read(self.source, 1 << 20)
            assert more, "the browser has gone"
            self.rest += more
        raw, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(raw)
        return found


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """Start the browser with its pipes at 3 and 4, as it wants them, and end it."""
    read, to = os.pipe()
    source, write = os.pipe()
    words = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",  # CI runs as root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'profile'}",
    ]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *words],
        pass_fds=(read, write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    try:
        yield Tab(to, source)
    finally:
        process.terminate()
        process.wait(SECONDS)
        os.close(to)
        os.close(source)


def bars(shift: float) -> list[dict[str, Any]]:
    return [
        {
            "low": at / 10,
            "high": (at + 1) / 10,
            "count": 10 * at,
            "confidence": at / 10 + 0.05 if at else None,
            "accuracy": max(0.0, at / 10 - shift) if at else None,
        }
        for at in range(10)
    ]


def report(name: str, shift: float) -> Report:
    """Return a report with something for every part of the page, and words that want escaping."""

    def share(label: str, value: float, base: float, **detail: Any) -> Score:
        return measured(
            label,
            value,
            unit="fraction",
            higher_is_better=True,
            ci95=(value - 0.04, min(1.0, value + 0.04)),
            n=200,
            baseline=base,
            delta_ci95=(value - base - 0.03, value - base + 0.03),
            detail=detail,
        )

    long = "a_task_with_a_name_so_long_that_no_phone_has_room_for_it_in_one_line"
    flip = {"prompt": "<script>x()</script> & more", "model": "Sure" * 60, "baseline": "I cannot."}
    found = [
        share("accuracy/knowledge/acc", 0.9 - shift, 0.9),
        share(f"accuracy/{long}/acc", 0.7, 0.72),
        measured(
            "accuracy/perplexity",
            2.2 + shift,
            unit="perplexity",
            higher_is_better=False,
            ci95=(2.1, 2.6),
            n=69,
            baseline=2.2,
            delta_ci95=(shift - 0.1, shift + 0.1),
        ),
        measured(
            "fidelity/kl",
            0.1,
            unit="nats/token",
            higher_is_better=False,
            n=69,
            detail={"positions": [0.2, 0.1, 0.05], "position_step": 16},
        ),
        measured(
            "fidelity/layer_error",
            0.2,
            unit="ratio",
            higher_is_better=False,
            n=69,
            detail={"layers": [0.05, 0.1, 0.2]},
        ),
        measured(
            "calibration/ece",
            0.05,
            unit="fraction",
            higher_is_better=False,
            n=200,
            detail={"diagram": bars(shift), "baseline_diagram": bars(0.0)},
        ),
        share("safety/refusal_rate", 0.6, 0.9),
        measured(
            "safety/harmful_flips",
            0.3,
            unit="fraction",
            higher_is_better=False,
            ci95=(0.2, 0.4),
            n=180,
            detail={"yes": 54, "examples": [flip, flip]},
        ),
        measured(
            "efficiency/disk_bytes",
            1e6 * (1 - shift),
            unit="bytes",
            higher_is_better=False,
            baseline=2e6,
        ),
        missing(
            "efficiency/energy_j_per_token",
            "no meter",
            unit="J/token",
            higher_is_better=False,
            status="unmeasurable",
        ),
    ]
    plain = Report(
        schema=SCHEMA,
        model=Subject(id=name),
        baseline=Subject(id="builtin:tinyworld"),
        machine={"cpu": "a processor", "isa": ["avx2"]},
        versions={"unicomp": "0.1.0"},
        seeds={"windows": 0},
        scores=found,
    )
    verdicts = decide(plain, [Gate("safety/refusal_rate", max_drop=0.05)])
    return plain.model_copy(update={"gates": [verdict.to_json() for verdict in verdicts]})


def pages(folder: Path) -> dict[str, Path]:
    reports = [report("<b>three & bits", 0.2), report("four", 0.1), report("eight", 0.0)]
    side = compare(reports, [Gate("accuracy/*/acc", min=0.8)])
    texts = {
        "score": scorecard.render(reports[0]),
        "compare": comparison.render(side, reports),
    }
    found = {}
    for name, text in texts.items():
        found[name] = folder / f"{name}.html"
        sheet.write(found[name], text)
    return found


def test_pages_in_a_browser(tmp_path: Path) -> None:
    plots = {"score": 7, "compare": 6}
    with tab(tmp_path) as shown:
        for name, path in pages(tmp_path).items():
            for width, dark in ((DESK, False), (PHONE, True)):
                shown.open(path, width, dark=dark)
                assert shown.complaints() == []
                assert shown.requests() == [path.as_uri()]
                assert shown.value("document.querySelectorAll('svg').length") == plots[name]
                sizes = "[...document.querySelectorAll('svg')].map(own => own.clientHeight)"
                assert min(shown.value(sizes)) > 60
                wide = shown.value("document.documentElement.scrollWidth")
                assert wide <= width, f"{name}: {wide} wide on a screen of {width}"
                least = "Math.min(...[...document.querySelectorAll('svg text')].map(own => "
                least += "own.getBoundingClientRect().height))"
                assert shown.value(least) > 8, "text of a plot is too small to read"
                assert shown.value("document.querySelectorAll('script').length") == 0
                back = shown.value("getComputedStyle(document.body).backgroundColor")
                assert back == ("rgb(20, 23, 28)" if dark else "rgb(251, 251, 249)")
                shown.picture(tmp_path / f"{name}-{width}.png")
                assert (tmp_path / f"{name}-{width}.png").stat().st_size > 20_000


def test_the_test_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A page that fetches, complains and is too wide is found out."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><img src="picture.png"><script>console.error("x")</script>'
        '<div style="width:900px">wide</div>'
    )
    with tab(tmp_path) as shown:
        shown.open(bad, PHONE)
        assert len(shown.requests()) == 2
        assert any("console" in own for own in shown.complaints())
        assert shown.value("document.documentElement.scrollWidth") > PHONE


def test_the_policy_lets_nothing_in(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(sheet.page("x", ['<img src="https://example.org/x.png">']))
    with tab(tmp_path) as shown:
        shown.open(page, DESK)
        assert any("Content Security Policy" in own for own in shown.complaints())
