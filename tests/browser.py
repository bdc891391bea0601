"""A headless Chromium, driven over its DevTools protocol.

`make browser` installs one into build/browser from npm. Otherwise one that is on PATH is used.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

INSTALLED = Path(__file__).resolve().parents[1] / "build" / "browser" / "chromium"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
"""The sandbox needs privileges that a container may not have; the browser opens pages of the tests only."""


def find_chromium() -> str | None:
    """The program; None where there is none."""
    if INSTALLED.exists():
        return str(INSTALLED)
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """The browser's only page.

    Attributes:
        problems: errors that the page has logged, refusals by its Content-Security-Policy included; HTTP's are not.
        addresses: of all that the page has loaded.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.numbers = itertools.count(1)
        self.problems: list[str] = []
        self.addresses: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; returns its result."""
        number = next(self.numbers)
        self.connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self.connection.recv(timeout=300))).get("id") != number:
            self._note(message.get("method"), message.get("params", {}))
        assert "error" not in message, message
        return message["result"]

    def _note(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Log.entryAdded":
            entry = parameters["entry"]
            if entry["level"] == "error" and entry["source"] != "network":
                self.problems.append(entry["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Network.requestWillBeSent":
            self.addresses.append(parameters["request"]["url"])

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.wait_for("location.href != 'about:blank' && document.readyState == 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 300) -> Any:
        """The expression's value, once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"not true after {seconds} s: {expression}; {self.problems}"
            time.sleep(0.1)
        return value

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def use_colours(self, scheme: str) -> None:
        """``scheme``: light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextlib.contextmanager
def browser(program: str, folder: Path) -> Iterator[Page]:
    """Run a browser with a new profile in ``folder``.

    Raises:
        RuntimeError: it does not start within 300 s.
    """
    profile = folder / "profile"
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log
        )
    try:
        with urlopen(f"http://127.0.0.1:{_port(process, profile)}/json/list", timeout=300) as response:
            (target,) = [target for target in json.load(response) if target["type"] == "page"]
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            yield Page(connection)
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen, profile: Path) -> int:
    """The port that the browser has chosen for the protocol."""
    file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + 300
    while not (file.exists() and (lines := file.read_text().splitlines())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the browser does not start: {file.parent.parent / 'browser.log'}")
        time.sleep(0.05)
    return int(lines[0])
