"""The console of a run in a terminal: one live line, and no bar of another library."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from types import SimpleNamespace

from contrastive_align.launch.console import LiveLine


SIZE = (40, 120)


def in_a_terminal(argv):
    """Run a program in a terminal and return what it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        os.execv(argv[0], argv)
    parts = []
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux's way of saying that the program has ended
            break
        if not part:
            break
        parts.append(part)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, b"".join(parts)[-2000:]
    return b"".join(parts).decode()


def lines_left(text):
    """Return the lines that are left on the screen, which know of carriage return, line feed and one line up."""
    screen, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\w*|\r|\n|[^\x1b\r\n]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif token == "\x1b[A":
            row -= 1
        elif not token.startswith("\x1b"):
            screen[row] = screen[row][:column].ljust(column) + token + screen[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in screen]


def test_in_a_terminal_there_is_one_live_line_and_no_other_bar(tmp_path):
    flags = ["--max_steps=2", "--max_train_samples=16", "--max_eval_samples=4", "--logging_steps=1"]
    flags += ["--eval_strategy=steps", "--eval_steps=1", "--report_prompts=2", f"--output_dir={tmp_path / 'out'}"]
    text = in_a_terminal([sys.executable, "-m", "contrastive_align", "reward", *flags])
    for bar in ("Loading weights", "Writing model shards", "Map", "Tokenizing", "it/s]\r\n"):
        assert bar not in text, bar
    found = [line for line in lines_left(text) if line.startswith("step ")]
    assert len(found) == 1 and found[0].startswith("step 2/2 ") and " loss " in found[0] and "tokens/s" in found[0]
    assert not re.search(r"step \d/2[^\r\n]*,\s*loss", text)


def test_the_live_line_keeps_its_rate_at_an_evaluation():
    line, state = LiveLine(bar=True), SimpleNamespace(is_world_process_zero=True)
    for tokens in (100, 300):
        line.on_log(None, state, None, logs={"loss": 1.0, "num_tokens": tokens})
    assert "tokens/s" in line.text(state, {"loss": 1.0, "num_tokens": 300})
    assert "tokens/s" in line.text(state, {"eval_loss": 1.0})
