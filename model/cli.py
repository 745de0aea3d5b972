"""What the command lines of all scripts share: paths, value checks, and how an error is shown."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # default paths start here, so a script runs from any folder


def run_main(main: Callable[[], int | None]) -> None:
    """Runs `main`; a mistake of the user's becomes one line on stderr and exit code 2, no traceback.

    ValueError and OSError are the user's (a wrong value, a missing file, a full disk); anything else is a
    fault of ours and keeps its traceback. MINIMIND_DEBUG=1 shows the traceback in every case.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error: BaseException) -> str:
    """The message of an exception on a single line, with the file name of an OSError."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def number(kind: type, low: float | None = None, high: float | None = None, *, above: bool = False):
    """An argparse type: an int or float within [low, high]; with `above`, strictly greater than low."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if value != value or (low is not None and (value < low or (above and value == low))):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} must be at most {high}")
        return value

    return parse


positive_int = number(int, 1)
non_negative_int = number(int, 0)
positive_float = number(float, 0, above=True)
non_negative_float = number(float, 0)
