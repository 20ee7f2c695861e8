"""A headless Chromium that is told what to do over two pipes, in its DevTools protocol: no driver
to install, no port to find."""

import base64
import json
import os
import select
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE_S = 60
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run
    --disable-background-networking --disable-component-update --hide-scrollbars
    --remote-debugging-pipe
""".split()


def found() -> str | None:
    """Where it is; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did, and how it looks."""

    requests: list[str] = field(default_factory=list)
    """Addresses that it asked for, itself first."""
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console."""
    width: int = 0
    """Of its content: wider than the window is what a phone must scroll sideways."""
    background: str = ""
    ink: str = ""
    """Colour of a word in the first figure."""
    png: bytes = b""


class Browser:
    """``with Browser(path, profile) as browser: browser.look(page, width=390, dark=True)``"""

    def __init__(self, path: str, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def as_3_and_4() -> None:  # the numbers that it reads and writes
            high = [os.dup(fd) for fd in (theirs_in, theirs_out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=as_3_and_4,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self._number, self._events, self._rest = 0, list[dict[str, Any]](), b""
        pages = self.tell("Target.getTargets")["targetInfos"]
        page = next(p["targetId"] for p in pages if p["type"] == "page")
        attached = self.tell("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.tell(f"{domain}.enable", page=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close(), self._out.close()

    def look(self, page: Path, *, width: int, dark: bool) -> Seen:
        """Open it in a window so wide, photograph all of it."""
        self._events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", page=True, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", page=True, features=[scheme])
        self.tell("Page.navigate", page=True, url=page.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            self._take()
        content = self.tell("Page.getLayoutMetrics", page=True)["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, **{k: content[k] for k in ("width", "height")}}
        shot = self.tell("Page.captureScreenshot", page=True, captureBeyondViewport=True, clip=clip)
        return Seen(
            requests=[e["params"]["request"]["url"] for e in self._of("Network.requestWillBeSent")],
            complaints=[json.dumps(e["params"]) for e in self._of(*COMPLAINTS)],
            width=int(self.value("document.documentElement.scrollWidth")),
            background=self.value("getComputedStyle(document.body).backgroundColor"),
            ink=self.value("getComputedStyle(document.querySelector('svg text')).fill"),
            png=base64.b64decode(shot["data"]),
        )

    def value(self, expression: str) -> Any:
        """What the page makes of a line of JavaScript."""
        return self.tell("Runtime.evaluate", page=True, expression=expression)["result"]["value"]

    def tell(self, method: str, *, page: bool = False, **params: Any) -> dict[str, Any]:
        """One command, and its answer; what happens meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if page else {}
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._take()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _take(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            answers, _, _ = select.select([self._in], [], [], PATIENCE_S)
            assert answers, f"chromium has said nothing for {PATIENCE_S} s"
            part = os.read(self._in.fileno(), 2**16)
            assert part, "chromium has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message

    def _of(self, *methods: str) -> list[dict[str, Any]]:
        return [e for e in self._events if e["method"] in methods]


COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
