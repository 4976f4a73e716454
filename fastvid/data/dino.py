"""The dinosaur game of Chromium, recorded from the game itself: real, stochastic, and repeatable to the bit.

chrome://dino runs headless with its clock, its random numbers and its animation frames replaced (dino.js), so that a
clip depends on its seed alone. A rule plays: it jumps when the next obstacle is a random number of frames away.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.data.seeds import SPLITS, check_request, split_of
from fastvid.errors import DataError

__all__ = ["SPLITS", "VERSION", "DinoRecorder"]

VERSION = 1
FPS = 30.0
GAME_FRAMES = 2  # of the game's 60 a second, per recorded frame
VIEW_LEFT, VIEW = 32, 192  # CSS pixels: a square of the page around the canvas, the dinosaur at its left
CALL_SECONDS = 60.0
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
    "--force-device-scale-factor=1", "--window-size=1000,500", "--remote-debugging-pipe",
)


class DinoRecorder:
    """A browser that records the game: `with DinoRecorder() as game: clip = game.clip(seed, frames)`.

    size:   (H, W) of the frames in pixels; 64 x 64 is an exact third of the recorded view.
    Raises: DataError if no Chromium is found or it does not answer.
    """

    def __init__(self, size: tuple[int, int] = (64, 64)):
        self.size = size
        self._browser = None

    def __enter__(self) -> "DinoRecorder":
        self._browser = _Browser(_find_chromium())
        try:
            self._browser.open("chrome://dino", Path(__file__).with_name("dino.js").read_text(encoding="utf-8"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._browser is not None:
            self._browser.close()
            self._browser = None

    def clip(self, seed: int, frames: int = 64) -> Tensor:
        """The clip of a seed: the same bytes in any browser process and after any other clips.

        seed:    in one of SPLITS. frames: at least 1, 30 to the second.
        Returns: [T, H, W, 3] uint8, grey.
        Raises:  DataError if the recorder is not open, an argument is out of range, or the browser fails.
        """
        if self._browser is None:
            raise DataError("DinoRecorder is not open; use it in a with statement.")
        check_request("dino", frames, self.size)
        split_of("dino", seed)
        options = {"frames": frames, "every": GAME_FRAMES, "x": VIEW_LEFT, "width": VIEW}
        text = self._browser.evaluate(f"recordDino({seed}, {json.dumps(options)})")
        if not text:
            raise DataError(f"DinoRecorder: the player of seed {seed} never survives {frames} frames; ask for fewer.")
        grey = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        return self._view(grey.view(frames, -1, VIEW))

    def _view(self, canvas: Tensor) -> Tensor:
        """Canvas rows on a white square page, reduced to the frame size. [T, h, VIEW] -> [T, H, W, 3]."""
        page = F.pad(canvas.float().unsqueeze(1), (0, 0, VIEW - canvas.shape[1], 0), value=255.0)
        small = F.interpolate(page, self.size, mode="bilinear", antialias=True, align_corners=False)
        return small.round().clamp(0, 255).to(torch.uint8).squeeze(1).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()


class _Browser:
    """A headless Chromium spoken to over the DevTools pipe: JSON messages that end in NUL, on descriptors 3 and 4."""

    def __init__(self, binary: str):
        self.profile = tempfile.mkdtemp(prefix="fastvid-dino-")
        commands, self.to = os.pipe()
        self.answers, replies = os.pipe()
        # out of the way first: either may by chance have the number that the other must get
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands, replies)]
        self.process, self.session, self.last, self.buffer = None, None, 0, b""
        try:
            self.process = subprocess.Popen(
                [binary, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"], pass_fds=(3, 4),
                preexec_fn=lambda: (os.dup2(theirs[0], 3), os.dup2(theirs[1], 4)), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": self.profile},  # Chromium leaves a folder behind when it is killed
            )
        except OSError as error:
            self.close()
            raise DataError(f"{binary} cannot be run: {error.strerror}; install or name another Chromium.") from error
        finally:
            for end in (commands, replies, *theirs):
                os.close(end)

    def open(self, url: str, script: str) -> None:
        """Load a page with `script` run before its own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + CALL_SECONDS
        ready = "document.readyState === 'complete' && typeof Runner === 'function' && !!Runner.getInstance().tRex"
        while not self.evaluate(f"(() => {{ try {{ return {ready}; }} catch {{ return false; }} }})()"):
            if time.monotonic() > deadline:
                raise DataError(f"the browser opened {url} but its game did not start; try another Chromium.")
            time.sleep(0.05)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            what = result["exceptionDetails"].get("exception", {}).get("description", "an exception")
            raise DataError(f"the game's page failed: {what.splitlines()[0]}; this Chromium's game may be a newer one.")
        return result["result"].get("value")

    def call(self, method: str, **params) -> dict:
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        deadline = time.monotonic() + CALL_SECONDS
        try:
            os.write(self.to, json.dumps(message).encode() + b"\0")
            while True:
                answer = json.loads(self._receive(deadline))
                if answer.get("id") == self.last:
                    break
        except OSError as error:
            raise DataError(f"the browser ended before it answered {method}: {error.strerror}.") from error
        if "error" in answer:
            raise DataError(f"the browser refused {method}: {answer['error'].get('message')}.")
        return answer["result"]

    def _receive(self, deadline: float) -> bytes:
        parts = [self.buffer]
        while b"\0" not in parts[-1]:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise DataError(f"the browser did not answer within {CALL_SECONDS:.0f} s.")
            parts.append(os.read(self.answers, 1 << 20))
            if not parts[-1]:
                raise DataError("the browser ended before it answered; run it by hand to see why.")
        message, self.buffer = b"".join(parts).split(b"\0", 1)
        return message

    def close(self) -> None:
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has already ended
            self.process.wait()
        os.close(self.to)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)


def _find_chromium() -> str:
    named = os.environ.get("FASTVID_CHROMIUM")
    for name in [named] if named else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]:
        if found := shutil.which(name):
            return found
    if named:
        raise DataError(f"FASTVID_CHROMIUM names {named!r}, which cannot be run; correct or unset it.")
    raise DataError("the dinosaur game needs Chromium, which was not found; apt-get install chromium.")
