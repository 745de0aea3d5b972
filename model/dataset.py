"""Data files to batches: reading, the token cache, packing into rows, the order of an epoch.

    file --read_records--> record --to_text / to_messages--> text or messages
         --token cache--> memory-mapped ids --packing--> rows of max_seq_len tokens --> Batch

Nothing is tokenized during training: the first use of a file encodes it once, beside the file.
"""

import ast
import codecs
import csv
import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from model.tokenizer import check_messages

IGNORE = -100  # a label that is not trained
FORMATS = (".jsonl", ".json", ".csv", ".txt")
BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 24  # what is longer is taken for damage (a quote not closed), not for a text
MAX_HISTORY_CHARS = 1 << 20
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

OnBad = Callable[[Path, int, str], None]

# ---------------------------------------------------------------------------------------------------------
# 1. Files to records
# ---------------------------------------------------------------------------------------------------------


def read_records(
    path: str | Path, on_bad: OnBad, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[int, dict]]:
    """Yields (line number, record) of a .jsonl, .json, .csv or .txt file or a .gz of one; memory stays flat.

    A record is a JSON object, a CSV row by its header, or {"text": line} of a .txt. JSON files hold one array,
    or an object a line. Blank lines are skipped. What cannot be parsed goes to on_bad(path, line number,
    reason) and reading goes on; a reason up to its first colon is the kind of fault. on_bytes gets the number
    of the file's bytes read so far.
    Raises: ValueError for another kind of file, OSError if it cannot be opened.
    """
    path = Path(path)
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"cannot read {path}: its name must end in {', '.join(FORMATS)}, or one of them + .gz")
    bad = partial(on_bad, path)
    blocks = _blocks(path, packed, bad, on_bytes)
    first = next(blocks, b"").removeprefix(codecs.BOM_UTF8)
    blocks = chain([first], blocks)
    if suffix == ".csv":
        return _csv_rows(_lines(blocks, bad), bad)
    if suffix != ".txt" and first.lstrip().startswith(b"["):
        return _json_array(blocks, bad)
    return (_text_lines if suffix == ".txt" else _json_lines)(_lines(blocks, bad), bad)


def _blocks(path: Path, packed: bool, bad: Callable, on_bytes: Callable | None) -> Iterator[bytes]:
    with open(path, "rb") as raw, gzip.open(raw) if packed else raw as file:
        while True:
            try:
                block = file.read(BLOCK_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                bad(0, f"damaged gzip: {error}; the rest of the file is lost")
                return
            if not block:
                return
            if on_bytes:
                on_bytes(raw.tell())
            yield block


def _lines(blocks: Iterator[bytes], bad: Callable) -> Iterator[tuple[int, str]]:
    """Yields (line number, line with its end). Bytes that are not UTF-8 become surrogates, see _utf8_fault."""
    number, rest, dropping = 0, b"", False
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            if not dropping:
                yield number, (line + b"\n").decode("utf-8", "surrogateescape")
            dropping = False
        if len(rest) > MAX_RECORD_BYTES:
            if not dropping:
                bad(number + 1, f"too long: a line of more than {MAX_RECORD_BYTES:,} bytes")
            rest, dropping = b"", True
    if rest and not dropping:
        yield number + 1, rest.decode("utf-8", "surrogateescape")


def _utf8_fault(text: str) -> str | None:
    """Returns what is wrong with a text decoded with surrogateescape, None if it is sound."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return f"bad UTF-8: byte 0x{byte:02x}; save the file as UTF-8 (iconv -f GB18030 -t UTF-8)"
    return None


def _text_lines(lines: Iterator[tuple[int, str]], bad: Callable) -> Iterator[tuple[int, dict]]:
    for number, line in lines:
        if fault := _utf8_fault(line):
            bad(number, fault)
        elif not line.isspace():
            yield number, {"text": line.rstrip("\r\n")}


def _json_lines(lines: Iterator[tuple[int, str]], bad: Callable) -> Iterator[tuple[int, dict]]:
    for number, line in lines:
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad(number, _utf8_fault(line) or f"not JSON: {error}")
            continue
        if fault := _utf8_fault(line):
            bad(number, fault)
        elif not isinstance(record, dict):
            bad(number, f"not an object: {reprlib.repr(record)}")
        else:
            yield number, record


def _json_array(blocks: Iterator[bytes], bad: Callable) -> Iterator[tuple[int, dict]]:
    """Decodes one element after the other from a window over the file. After a broken one it goes on at the
    next "}, {"."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    between, next_object = re.compile(r"[\s,\[\]]*"), re.compile(r"\}\s*,\s*(?=\{)")
    parse = json.JSONDecoder().raw_decode
    text, at, line, at_end, broken = "", 0, 1, False, False

    while True:
        start = at  # everything before `at` is done with
        if broken:  # look for the next object
            found = next_object.search(text, at)
            at, broken = (found.end(), False) if found else (max(at, len(text) - 1000), True)
        at = at if broken else between.match(text, at).end()
        line += text.count("\n", start, at)
        end, fault = at, None
        if not broken and at < len(text):
            try:
                record, end = parse(text, at)
            except RecursionError:
                fault, end = "not JSON: nested too deeply", at + 1
            except json.JSONDecodeError as error:
                near_end = error.msg.startswith("Unterminated") or error.pos > len(text) - 16
                if at_end or not near_end or len(text) - at > MAX_RECORD_BYTES:
                    fault, end = f"not JSON: {error.msg}", max(error.pos, at)
        if fault:
            bad(line, _utf8_fault(text[at:end]) or fault)
            broken = True
        elif end > at:
            if fault := _utf8_fault(text[at:end]):
                bad(line, fault)
            elif not isinstance(record, dict):
                bad(line, f"not an object: {reprlib.repr(record)}")
            else:
                yield line, record
        elif at_end:
            return
        else:  # the window ends inside an element
            block = next(blocks, b"")
            text, at, at_end = text[at:] + decode(block, final=not block), 0, not block
            continue
        line += text.count("\n", at, end)
        at = end


def _csv_rows(lines: Iterator[tuple[int, str]], bad: Callable) -> Iterator[tuple[int, dict]]:
    number, ended, header = 0, False, None

    def feed() -> Iterator[str]:
        nonlocal number, ended
        for number, line in lines:  # noqa: B007, the number is read below
            yield line
        ended = True

    csv.field_size_limit(MAX_RECORD_BYTES)  # the module's default stops at 131,072 characters
    reader = csv.reader(feed())
    while True:
        start = number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad(start, f"bad CSV: {error}")
            continue
        if not row:
            continue
        if ended:
            bad(start, "bad CSV: a quote is not closed before the end of the file")
        elif fault := _utf8_fault("".join(row)):
            bad(start, fault)
        elif header is None:
            header = [cell.strip() for cell in row]
        elif len(row) != len(header):
            bad(start, f"wrong number of cells: {len(row)} where the header has {len(header)}")
        else:
            yield start, dict(zip(header, row, strict=True))


# ---------------------------------------------------------------------------------------------------------
# 2. Records to texts, conversations, preference pairs
# ---------------------------------------------------------------------------------------------------------


def to_text(record: dict) -> str:
    """Returns the text of a pretraining record {"text": ...}. Raises: ValueError for another key or no text."""
    return _string(_value(record, "text"), "text")


def to_messages(record: dict) -> list[dict]:
    """Returns a conversation [{"role", "content"}, ...] that ends with an answer, from any of the SFT formats:

    {"conversations" or "messages": [{"role", "content"} or {"from", "value"}, ...]}
    {"q", "a", "history"}: v1's CSV; {"instruction", "input", "output", "history"}: alpaca
    A history is a list of [question, answer] pairs, or its JSON, or in v1's CSV the Python list as text. An
    optional "system" is the system text. A last question without an answer is left out.
    Raises: ValueError that says what is wrong.
    """
    if "conversations" in record or "messages" in record:
        key = "conversations" if "conversations" in record else "messages"
        messages = _messages(record[key], key)
        if messages[-1]["role"] == "user":
            messages.pop()
    elif "q" in record or "output" in record:
        if "q" in record:
            question, answer = record["q"], _value(record, "a")
        else:
            parts = [_string(record.get(key) or "", key, empty=True) for key in ("instruction", "input")]
            question, answer = "\n".join(filter(None, parts)), record["output"]
        turns = [*_history(record.get("history")), (question, answer)]
        messages = [m for turn in turns for m in zip(("user", "assistant"), turn, strict=True)]
        messages = [{"role": role, "content": content} for role, content in messages]
    else:
        raise ValueError(f"no conversation: the keys are {reprlib.repr(list(record))}")
    messages = _checked(_with_system(record, messages))
    if messages[-1]["role"] != "assistant":
        raise ValueError("no answer: the conversation has no assistant turn")
    return messages


def to_pair(record: dict) -> dict:
    """Returns {"prompt": messages that end with a question, "chosen": answer, "rejected": answer}.

    From {"prompt": text or messages, "chosen", "rejected"}, {"conversations", "chosen", "rejected"}, or
    {"chosen": messages, "rejected": messages} that differ in the last answer only. An answer is a text or a
    message. Raises: ValueError that says what is wrong.
    """
    prompt = record.get("prompt", record.get("conversations", []))
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    prompt = _messages(prompt, "prompt") if prompt else []
    answers, before = [], []
    for key in ("chosen", "rejected"):
        answer = _value(record, key)
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        *start, last = _messages([answer] if isinstance(answer, dict) else answer, key)
        if last["role"] != "assistant":
            raise ValueError(f"no answer: {key} ends with a turn of the {last['role']}")
        answers.append(_string(last["content"], key))
        before.append(start)
    if before[0] != before[1]:
        raise ValueError("two prompts: chosen and rejected differ before the last answer")
    if answers[0] == answers[1]:
        raise ValueError("no preference: chosen and rejected are the same")
    prompt = _checked(_with_system(record, prompt + before[0]))
    if prompt[-1]["role"] != "user":
        raise ValueError("wrong turn order: the prompt must end with a turn of the user")
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def _messages(items: object, key: str) -> list[dict]:
    """Returns [{"role", "content"}, ...] from that or from [{"from", "value"}, ...]."""
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"bad {key}: it must be a list of messages, not {reprlib.repr(items)}")
    messages = []
    for item in items:
        role, content = (item.get(a, item.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"unknown role: {reprlib.repr(role)} is none of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _with_system(record: dict, messages: list[dict]) -> list[dict]:
    return [{"role": "system", "content": record["system"]}, *messages] if record.get("system") else messages


def _checked(messages: list[dict]) -> list[dict]:
    for message in messages:
        _string(message["content"], message["role"] + " turn")
    try:
        check_messages(messages)
    except ValueError as error:
        raise ValueError(f"wrong turn order: {error}") from None
    return messages


# v1 wrote str(list). Without its quoted strings, nothing but brackets and commas may be left.
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_BRACKETS = re.compile(r"[\[\](),\s]*")


def _history(value: object) -> list[tuple[str, str]]:
    """Returns the (question, answer) pairs of a history: a list, or JSON or a Python list as text."""
    if isinstance(value, str):
        if len(value) > MAX_HISTORY_CHARS:
            raise ValueError(f"bad history: {len(value):,} characters, the limit is {MAX_HISTORY_CHARS:,}")
        text = value.strip() or "[]"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            # literal_eval runs no code, but deep nesting can crash the interpreter. So only what is a list of
            # strings gets there; the parser itself refuses more than 200 brackets.
            if not _BRACKETS.fullmatch(_QUOTED.sub("", text)):
                raise ValueError(f"bad history: neither JSON nor a list of strings: {reprlib.repr(text)}") from None
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                raise ValueError(f"bad history: {error}: {reprlib.repr(text)}") from None
    pairs = [] if value is None else value
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise ValueError(f"bad history: it must be a list of [question, answer] pairs, not {reprlib.repr(pairs)}")
    return [(question, answer) for question, answer in pairs]


def _value(record: dict, key: str) -> object:
    if key not in record:
        raise ValueError(f"no key {key!r}: the keys are {reprlib.repr(list(record))}")
    return record[key]


def _string(value: object, name: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a string: {reprlib.repr(value)}")
    if not empty and not value.strip():
        raise ValueError(f"empty {name}")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"half a surrogate pair: in the {name}") from None
    return value
