"""`kvfold chat` as it is used: in a terminal of its own, and with lines from a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvfold.sessions import archive

ARGUMENTS = ("-m", "kvfold", "chat", "demo", "--max-tokens", "8", "--temperature", "0")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """A child process with a pseudo-terminal, 100 columns wide, and all that it wrote."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job is started without it
            os.environ.update(TERM="xterm", COLUMNS="100", LINES="40", PROMPT_TOOLKIT_NO_CPR="1", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, *ARGUMENTS, *arguments])
        self.text, self.seen = "", 0

    def expect(self, what: str, seconds: float = 120.0) -> str:
        """Text up to and with the first match after the last one."""
        end = time.monotonic() + seconds
        while (found := re.compile(what).search(self.text, self.seen)) is None:
            assert time.monotonic() < end, f"no {what!r} in {self.text[self.seen :]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.text += ESCAPES.sub("", os.read(self.fd, 65536).decode(errors="replace"))
                except OSError as error:  # the child closed it
                    raise AssertionError(f"it ended; no {what!r} in {self.text[self.seen :]!r}") from error
        start, self.seen = self.seen, found.end()
        return self.text[start : found.end()]

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode())

    def say(self, line: str, answer: str) -> str:
        self.expect(r"(?m)^>")
        self.type(line + "\r")
        return self.expect(answer)

    def leave(self) -> int:
        """Ctrl-D; the exit code."""
        self.expect(r"(?m)^>")
        self.type("\x04")
        self.expect("Go on with: kvfold chat demo --session [^\n]*\n")
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return code


def test_a_conversation_in_a_terminal_goes_on_after_a_restart(tmp_path: Path) -> None:
    t = Terminal("--disk", str(tmp_path), "--session", "first")
    t.expect("/help lists commands")
    t.say("/help", r"/quit +leave")
    t.say("/nonsense", "there is no command /nonsense")
    t.say("/load", "/load needs a name")
    t.say("/load nobody", "no session 'nobody'")
    t.say("The function returns an error when the", r"8 tokens; 0 of \d+ were there already")
    t.say(" and the value", r"8 tokens; [1-9]\d* of \d+ were there already")
    t.say("/save", r"saved first: \d+ tokens")
    t.say("/fork second", "this is second now")
    t.say("/memory", r"(?s)at 16 bits.*allowed")
    t.say("/sessions", r"(?s)first.*second")
    t.say("/new third", "this is third now")
    t.say("/load second", r"(?s)user: The function.*assistant: .*second: \d+ tokens")
    assert t.leave() == 0
    assert {p.name for p in tmp_path.iterdir()} >= {"first", "second", ".history"}
    for name in ("first", "second"):
        archive.verify(tmp_path / name)
    t = Terminal("--disk", str(tmp_path), "--session", "first")
    t.expect(r"(?s)user: The function.*first: \d+ tokens.*/help lists")
    t.expect(r"(?m)^>")
    t.type("\x1b[A\r")  # what was typed last, before the restart
    t.expect("second: ")
    t.say(" then", r"8 tokens; [1-9]\d* of \d+ were there already")
    assert t.leave() == 0


def test_ctrl_c_ends_an_answer_and_nothing_else(tmp_path: Path) -> None:
    t = Terminal("--disk", str(tmp_path), "--max-tokens", "100000")
    t.expect("/help lists commands")
    t.say("The function returns", r"\w+ \w+ \w+ \w+")
    os.kill(t.pid, signal.SIGINT)
    t.expect("stopped")
    t.say("/sessions", r"chat-\d{8}-\d{4}")
    assert t.leave() == 0


def test_lines_from_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *ARGUMENTS, "--disk", str(tmp_path), "--session", "piped", "--system", "Be short."],
        input="The function returns\n/save copy\n/quit\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "8 tokens; 0 of" in done.stdout
    assert archive.info(tmp_path / "copy")["notes"]["messages"][0] == {"role": "system", "content": "Be short."}
    assert archive.info(tmp_path / "piped")["tokens"] == archive.info(tmp_path / "copy")["tokens"]
