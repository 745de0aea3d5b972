"""Runs a command and copies what it prints to a file, with its progress bars alive on the terminal.

    python scripts/run_logged.py LOG COMMAND [ARGUMENT ...]

A pipe to `tee` would take the terminal away from the command, and its progress bars with it. Here the command
writes to a pseudo-terminal where there is a terminal, else to a pipe. Of a line that was redrawn the file keeps the
last state.
The exit code is the command's. Ctrl-C reaches the command, which may still save; this waits until it has ended.
"""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import BinaryIO


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    path, command = Path(sys.argv[1]), sys.argv[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    on_terminal = sys.stdout.isatty()
    reader, writer = pty.openpty() if on_terminal else os.pipe()

    def copy_size(*_) -> None:  # progress bars ask how wide the terminal is
        fcntl.ioctl(reader, termios.TIOCSWINSZ, fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, bytes(8)))

    if on_terminal:
        copy_size()
        signal.signal(signal.SIGWINCH, copy_size)
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal has sent it to the command too
    with path.open("wb", buffering=0) as log, subprocess.Popen(command, stdout=writer, stderr=writer) as child:
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        os.close(writer)
        copy_output(reader, log)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def copy_output(reader: int, log: BinaryIO) -> None:
    """Copies until the command and its children have closed their end."""
    line = b""
    while True:
        try:
            data = os.read(reader, 1 << 16)
        except OSError:  # how Linux says that the other end of a pseudo-terminal is closed
            data = b""
        *lines, line = (line + data).split(b"\n")
        if not data and line:
            lines.append(line)
        for text in lines:
            log.write(text.rstrip(b"\r").rpartition(b"\r")[2] + b"\n")
        if not data:
            return
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
