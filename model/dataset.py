"""Data files to batches: reading, the token cache, packing into rows, the order of an epoch.

    file --read_records--> record --to_text / to_messages / to_pair--> text, messages or two answers
         --token cache--> memory-mapped ids --packing--> rows of max_seq_len tokens --> Batch, PairBatch

Nothing is tokenized during training: the first use of a file encodes it once, beside the file.
"""

import ast
import codecs
import csv
import fcntl
import gzip
import hashlib
import json
import mmap
import os
import re
import reprlib
import shutil
import sys
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model.tokenizer import ChatTokens, Tokenizer, check_messages

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
                block = file.read1(BLOCK_BYTES)  # gives what precedes a damage
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
    number, header = 0, None

    def feed() -> Iterator[str]:
        nonlocal number
        for number, line in lines:  # noqa: B007, the number is read below
            yield line

    csv.field_size_limit(MAX_RECORD_BYTES)  # the module's default stops at 131,072 characters
    reader = csv.reader(feed(), strict=True)  # a quote out of place is a fault; it goes on at the next line
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
        if fault := _utf8_fault("".join(row)):
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


# ---------------------------------------------------------------------------------------------------------
# 3. The token cache: a folder beside the file with the ids of all documents, written once, memory-mapped
# ---------------------------------------------------------------------------------------------------------
#
#     pretrain_data.csv.cache-0123456789abcdef/
#         tokens.bin    uint16 or uint32: all documents end to end
#         offsets.bin   int64: document i is tokens[offsets[i] : offsets[i + 1]]
#         mask.bin      uint8, not for pretraining: 1 where a token belongs to an answer that is trained
#         meta.json     sizes, counts, what the cache was made of
#
# It is built in a temporary folder and renamed, under a lock on the data file itself: a kill leaves a folder
# that is never opened, and of two processes the second waits and uses what the first has built.

CACHE_VERSION = 1  # raise it when the same file and tokenizer would give other arrays
CACHES_KEPT = 4  # of one file: for other tokenizers or row lengths, the last used
BATCH_CHARS = 1 << 18  # what one thread encodes at a time; longer texts are encoded in pieces of this size
FAULTS_SHOWN = 5


class _Encoded(NamedTuple):
    """Some documents as arrays."""

    tokens: np.ndarray
    ends: np.ndarray  # where in `tokens` each document ends
    mask: np.ndarray  # as long as tokens; empty for pretraining
    num_bytes: int  # UTF-8 bytes of the text to learn
    counts: dict[str, int]  # for .stats


class _Documents:
    """Pretraining: a record becomes <s>text</s>."""

    name = "pretrain"
    max_seq_len = 0  # the arrays do not depend on it
    arrays = {"tokens": "uint16", "offsets": "int64"}
    needs = 'a CSV with the header text, or {"text": ...} a line'

    def items(self, record: dict) -> Iterator[tuple[int, tuple]]:
        """Yields (characters, (piece of the text, is its first, is its last))."""
        text = to_text(record)
        for i in range(0, len(text), BATCH_CHARS):
            piece = text[i : i + BATCH_CHARS]
            yield len(piece), (piece, i == 0, i + BATCH_CHARS >= len(text))

    def encode(self, tokenizer: Tokenizer, items: list[tuple]) -> _Encoded:
        texts, first, last = zip(*items, strict=True)
        ids = [
            [tokenizer.bos_id] * is_first + piece + [tokenizer.eos_id] * is_last
            for piece, is_first, is_last in zip(tokenizer.encode_batch(texts), first, last, strict=True)
        ]
        ends = np.cumsum([len(piece) for piece in ids])[np.array(last)]
        num_bytes = sum(len(text.encode()) for text in texts)
        return _Encoded(_flat(ids, np.uint32), ends, np.empty(0), num_bytes, {"documents": len(ends)})


class _Conversations:
    """SFT: a record becomes the chat template's ids, cut to what fits a row, and a mask of its answers."""

    name = "sft"
    arrays = {"tokens": "uint16", "offsets": "int64", "mask": "uint8"}
    needs = "a CSV with the header history,q,a, or JSON conversations"

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len

    def items(self, record: dict) -> Iterator[tuple[int, list[dict]]]:
        """Yields (characters, messages)."""
        messages = to_messages(record)
        yield sum(len(message["content"]) for message in messages), messages

    def encode(self, tokenizer: Tokenizer, items: list[list[dict]]) -> _Encoded:
        parts, num_bytes, counts = [], 0, Counter()
        for messages, chat in zip(items, tokenizer.encode_chat_batch(items), strict=True):
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            of_this, kept = cut_conversation(chat, tokenizer.bos_id, self.max_seq_len)
            parts += of_this
            num_bytes += sum(len(answers[turn].encode()) for turn in kept)
            counts["conversations" if kept else "too long"] += 1
            counts["conversations cut"] += len(of_this) > 1 or 0 < len(kept) < len(answers)
        ids, masks = zip(*parts, strict=True) if parts else ((), ())
        ends = np.cumsum([len(part) for part in ids], dtype=np.int64)
        return _Encoded(_flat(ids, np.uint32), ends, _flat(masks, np.uint8), num_bytes, counts)


class _Pairs:
    """DPO: a record becomes two documents, the prompt with the chosen and with the rejected answer, in this order."""

    name = "dpo"
    arrays = _Conversations.arrays
    needs = 'JSON pairs {"prompt", "chosen", "rejected"}'

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len

    def items(self, record: dict) -> Iterator[tuple[int, dict]]:
        """Yields (characters, pair)."""
        pair = to_pair(record)
        texts = [message["content"] for message in pair["prompt"]] + [pair["chosen"], pair["rejected"]]
        yield sum(map(len, texts)), pair

    def encode(self, tokenizer: Tokenizer, items: list[dict]) -> _Encoded:
        prompts = tokenizer.encode_chat_batch([pair["prompt"] for pair in items])
        texts = tokenizer.encode_batch([pair[side] for pair in items for side in ("chosen", "rejected")])
        answers = [ids + [tokenizer.eos_id] for ids in texts]
        ids, masks, num_bytes = [], [], 0
        counts = Counter({"pairs": 0, "prompts cut": 0, "pairs cut": 0})
        for chat, *pair in zip(prompts, answers[::2], answers[1::2], strict=True):
            prompt, cut = cut_pair(chat, pair, tokenizer.bos_id, self.max_seq_len)
            if cut[0] == cut[1]:
                counts["too long"] += 1
                continue
            counts["pairs"] += 1
            counts["prompts cut"] += len(prompt) < len(chat.ids)
            counts["pairs cut"] += cut != pair
            ids += [prompt + answer for answer in cut]
            masks += [[0] * len(prompt) + [1] * len(answer) for answer in cut]
            num_bytes += sum(len(tokenizer.token_bytes(token)) for token in chain(*cut))
        ends = np.cumsum([len(sequence) for sequence in ids], dtype=np.int64)
        return _Encoded(_flat(ids, np.uint32), ends, _flat(masks, np.uint8), num_bytes, counts)


_Form = _Documents | _Conversations | _Pairs


def cut_conversation(chat: ChatTokens, bos_id: int, max_seq_len: int) -> tuple[list[tuple[list, list]], list[int]]:
    """Returns ([(ids, mask), ...], [number of each kept turn]): parts of at most max_seq_len + 1 ids.

    A conversation is cut between turns (a question with its answer) into as few parts as their order allows;
    each begins with the system text and ends with the </s> of an answer. All that is lost is the sight of the
    parts before, and turns that do not fit even alone: no answer is trained without its question or its end.
    """
    system = chat.ids.index(bos_id)  # its length
    after = chat.mask[::-1].index(1)  # ids after the last </s>: they train nothing

    def fits(start: int, end: int) -> bool:
        return system + (end - start) - after <= max_seq_len + 1

    spans: list[tuple[int, int]] = []
    kept = []
    for turn, (start, end) in enumerate(pairwise([system, *chat.turn_ends])):
        if spans and fits(spans[-1][0], end):  # never over a turn left out: that alone is too long
            spans[-1] = spans[-1][0], end
        elif fits(start, end):
            spans.append((start, end))
        else:
            continue
        kept.append(turn)
    cuts = [(slice(system), slice(start, end - after)) for start, end in spans]
    return [(chat.ids[a] + chat.ids[b], chat.mask[a] + chat.mask[b]) for a, b in cuts], kept


def cut_pair(
    prompt: ChatTokens, answers: list[list[int]], bos_id: int, max_seq_len: int
) -> tuple[list[int], list[list[int]]]:
    """Returns (ids of the prompt, ids of both answers), each answer with the prompt at most max_seq_len + 1 ids.

    The oldest turns (a question with its answer) of the prompt go first, for both sides the same; the system text
    stays. If the last question alone leaves too little room, both answers end at the same length. The two come out
    equal, perhaps empty, where nothing is left to tell them apart.
    """
    limit = max_seq_len + 1
    system = prompt.ids.index(bos_id)  # its length
    starts = [system, *prompt.turn_ends]  # of the turns; the last one is the question to answer
    longest = max(map(len, answers))
    fitting = (start for start in starts if system + len(prompt.ids) - start + longest <= limit)
    start = next(fitting, starts[-1])
    ids = prompt.ids[:system] + prompt.ids[start:]
    room = max(limit - len(ids), 0)
    return ids, [answer[:room] for answer in answers]


def _flat(lists: Iterable[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), dtype)


class _Faults:
    """Counts what cannot be used by kind, and keeps the first few messages."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[str] = []

    def __call__(self, path: Path, line: int, reason: str) -> None:
        self.counts[reason.split(":")[0]] += 1
        if len(self.first) < FAULTS_SHOWN:
            self.first.append(f"{path}:{line}: {reason}")


def _open_cache(path: Path, tokenizer: Tokenizer, form: _Form, workers: int | None) -> tuple[dict, dict]:
    """Returns ({name: memory-mapped array}, meta) of the file's token cache, built now if need be.

    Raises: ValueError if the file is missing, holds nothing usable, or nothing can be written beside it.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; it must be {form.needs}. Make it with `python data_process.py "
            f"{form.name} --input YOUR_FILES`, or an example with `python data_process.py demo`"
        )
    with open(path, "rb") as file:
        locked = False
        with suppress(OSError):  # a file system without locks: both build, one of the two is used
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, however this process ends
            locked = True
        identity = _file_identity(path)
        about = [CACHE_VERSION, form.name, form.max_seq_len, identity, tokenizer.fingerprint]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        folder = path.with_name(f"{path.name}.cache-{key}")
        if _map_arrays(folder) is None:
            if locked:
                _remove_outdated(path, identity)
            _build(folder, path, tokenizer, form, identity, workers)
        with suppress(OSError):
            os.utime(folder / "meta.json")  # when it was last used
        cache = _map_arrays(folder)
    if cache is None:
        raise OSError(f"the token cache {folder} cannot be read back; is the disk full or at fault?")
    return cache


def _file_identity(path: Path) -> list:
    """Returns [bytes, time of change in ns, sha256 over 64 samples of 4 KiB]: enough to know a file again.

    Whatever edits a file sets its time of change. The samples are for what resets that time (copies, archives,
    coarse clocks): other content of the very same length that is equal in all samples is no accident.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        for start in np.linspace(0, max(0, status.st_size - 4096), 64, dtype=np.int64):
            file.seek(int(start))
            digest.update(file.read(4096))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _map_arrays(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """Returns the arrays and meta of a finished cache; None if it is not there or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype, mode="r", shape=(length,))
            for name, (dtype, length) in meta["arrays"].items()
        }
    except (OSError, ValueError, KeyError):
        return None
    return arrays, meta


def _remove_outdated(path: Path, identity: list) -> None:
    """Removes unfinished caches, those of what the file was before, and of many the longest unused.

    To be called under the lock. A process that has mapped one of them keeps its arrays until it ends.
    """
    current = []
    for folder in path.parent.iterdir():
        if folder.name.startswith(f"{path.name}.cache-"):
            cache = _map_arrays(folder)
            if folder.suffix.startswith(".tmp") or cache is None or cache[1].get("file") != identity:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                current.append(folder)
    current.sort(key=lambda folder: (folder / "meta.json").stat().st_mtime_ns, reverse=True)
    for folder in current[CACHES_KEPT - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)


def _build(folder: Path, path: Path, tokenizer: Tokenizer, form: _Form, identity: list, workers: int | None) -> None:
    """Writes the cache of a file: all arrays and then meta.json into a temporary folder, which is renamed."""
    dtypes = form.arrays | ({"tokens": "uint32"} if tokenizer.vocab_size > 1 << 16 else {})
    faults, counts, num_bytes, lengths = _Faults(), Counter(), 0, dict.fromkeys(dtypes, 0)
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    try:
        temporary.mkdir()
    except PermissionError:
        raise ValueError(f"cannot write the token cache beside {path}; copy it to a folder of your own") from None
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in dtypes}

            def write(name: str, values: np.ndarray) -> None:
                files[name].write(values.astype(dtypes[name]).data)
                lengths[name] += len(values)

            write("offsets", np.zeros(1))
            for encoded in _encode_file(path, tokenizer, form, faults, workers):
                write("offsets", encoded.ends + lengths["tokens"])
                write("tokens", encoded.tokens)
                if "mask" in dtypes:
                    write("mask", encoded.mask)
                num_bytes += encoded.num_bytes
                counts.update(encoded.counts)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        if too_long := counts.pop("too long", 0):
            faults.counts["too long"] += too_long
        if lengths["offsets"] == 1:
            why = f". The first fault of {faults.counts.total():,}: {faults.first[0]}" if faults.first else ""
            raise ValueError(f"{path} holds nothing to train on; it must be {form.needs}{why}")
        if _file_identity(path) != identity:
            raise ValueError(f"{path} changed while it was read; start again when it is complete")
        meta = {
            "file": identity,
            "arrays": {name: [dtype, lengths[name]] for name, dtype in dtypes.items()},
            "num_bytes": num_bytes,
            "counts": {**counts, "not used": dict(faults.counts)},
        }
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():  # not whole, or built meanwhile where there are no locks
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if faults.counts:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in faults.counts.most_common())
        print(*faults.first, f"{path}: {faults.counts.total():,} records not used: {kinds}", sep="\n", file=sys.stderr)


def _encode_file(
    path: Path, tokenizer: Tokenizer, form: _Form, faults: _Faults, workers: int | None
) -> Iterator[_Encoded]:
    """Yields the file in encoded batches, in order; `workers` threads encode while this one reads and writes."""
    workers = workers or os.cpu_count() or 1
    bar = tqdm(
        total=path.stat().st_size,
        desc=f"tokenizing {path.name}",
        unit="B",
        unit_scale=True,
        delay=1,  # no bar for what is done in a second
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )

    def batches() -> Iterator[list]:
        batch, chars = [], 0
        for line, record in read_records(path, faults, lambda position: bar.update(position - bar.n)):
            try:
                items = list(form.items(record))
            except ValueError as error:
                faults(path, line, str(error))
                continue
            for item_chars, item in items:
                batch.append(item)
                chars += item_chars
                if chars >= BATCH_CHARS:
                    yield batch
                    batch, chars = [], 0
        if batch:
            yield batch

    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads are ours: a batch each, `workers` in all
    try:
        with bar, ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future] = deque()
            for batch in batches():
                waiting.append(pool.submit(form.encode, tokenizer, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# ---------------------------------------------------------------------------------------------------------
# 4. Packing: rows that are full
# ---------------------------------------------------------------------------------------------------------
#
# A row takes T = max_seq_len inputs, and the label of each is the token after it. Padding documents to rows,
# as v1 did, wastes half of the computation. Two ways around it:
#
#   pretraining   documents end to end, cut into rows anywhere (here T = 4; the label of the last input is the
#                 first input of the next row, so no token is lost at a cut):
#                     stream    <s> a b </s> <s> c d e f </s> ...
#                     row 0     <s> a b </s>      labels  a b </s> -
#                     row 1     <s> c d e         labels  c d e f
#   SFT           whole conversations, as many as fit (bin packing), attention kept apart by `documents`:
#                     inputs    [conversation 7 ......][conversation 2 ...][pad]
#                     documents  1 1 1 1 1 1 1 1 1 1 1  2 2 2 2 2 2 2 2 2  0 0
#
# DPO needs the sum over each answer, so there a sequence is a row, padded to the longest of its batch only.
#
# <s> is never a label: nothing that comes before a document says that one begins.


class Batch(NamedTuple):
    """Some rows of T tokens, ready for the model."""

    input_ids: torch.Tensor  # (B, T) int64; 0 where there is padding
    labels: torch.Tensor  # (B, T) int64: the token after each input; IGNORE where it is not trained
    documents: torch.Tensor | None  # (B, T) int32: number of the document in its row, from 1; 0 = padding

    @property
    def num_targets(self) -> int:
        """Labels that are trained."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        """Inputs that are not padding; where `documents` is None only an epoch's last row has any, and it counts."""
        return self.input_ids.numel() if self.documents is None else int((self.documents > 0).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch on that device. Not non_blocking: Apple GPUs would read memory already freed (pytorch
        issue 189690), and CUDA gains nothing without pinned memory."""
        return Batch(*(None if x is None else x.to(device) for x in self))


class PairBatch(NamedTuple):
    """P pairs, each sequence a row: rows 0 to P - 1 are the chosen ones, P to 2P - 1 the rejected, in the same order.

    T is the length of the longest, so it differs from batch to batch.
    """

    input_ids: torch.Tensor  # (2P, T) int64; 0 where there is padding
    labels: torch.Tensor  # (2P, T) int64: the token after each input; IGNORE but for the last answer
    documents: torch.Tensor  # (2P, T) int32: 1, or 0 = padding
    pairs: torch.Tensor  # (P,) int64: number of the pair, counted in the file over those used; -1 = no pair, padding

    @property
    def num_targets(self) -> int:
        """Labels that are scored, of both sides."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        """Inputs that are not padding, of both sides."""
        return int((self.documents > 0).sum())

    @property
    def num_chosen(self) -> int:
        """Labels of the chosen answers."""
        return int((self.labels[: len(self.pairs)] != IGNORE).sum())

    @property
    def num_pairs(self) -> int:
        """Pairs without those that are only padding."""
        return int((self.pairs >= 0).sum())

    def to(self, device: torch.device | str) -> "PairBatch":
        """Returns the batch on that device, see Batch.to."""
        return PairBatch(*(x.to(device) for x in self))


class _Shuffled:
    """An order of num_rows rows that the seed decides, another one each epoch."""

    seed: int
    num_rows: int
    _shuffled: tuple | None = None  # the last epoch asked for and its order

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *purpose]))

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, self._random(epoch).permutation(self.num_rows)
        return self._shuffled[1]


class _Rows(_Shuffled):
    """What the data of one file share: the arrays of the cache, the figures, the random order."""

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, form: _Form, max_seq_len: int, seed: int, workers: int | None
    ) -> None:
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len {max_seq_len}: a row needs at least 2 tokens")
        self.path, self.max_seq_len, self.seed, self.bos_id = Path(path), max_seq_len, seed, tokenizer.bos_id
        self._mapped, self._meta = _open_cache(self.path, tokenizer, form, workers)
        arrays = {name: np.asarray(array) for name, array in self._mapped.items()}  # np.memmap slices slowly
        self._tokens, self._offsets, self._mask = arrays["tokens"], arrays["offsets"], arrays.get("mask")
        size, _, sample_hash = self._meta["file"]
        self.fingerprint = f"{size} bytes, {sample_hash[:16]}"  # of the file, wherever it lies

    def _describe(self, num_rows: int, num_inputs: int | None, num_tokens: int) -> None:
        """Sets the figures that callers read; num_inputs is None where rows are not of max_seq_len."""
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self.num_bytes: int = self._meta["num_bytes"]
        figures = {"rows": num_rows, "target_tokens": num_tokens, "target_bytes": self.num_bytes}
        if num_inputs is not None:
            figures["fill"] = round(num_inputs / (num_rows * self.max_seq_len), 4)  # share that is not padding
        self.stats: dict = self._meta["counts"] | figures
        self._release()

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        lengths = self._offsets[documents + 1]
        lengths -= self._offsets[documents]  # in place: there may be millions
        return lengths

    def _lay(
        self, shape: tuple[int, int], documents: np.ndarray, at: np.ndarray, numbers: np.ndarray
    ) -> list[torch.Tensor]:
        """Returns input_ids, labels, documents, each of `shape` (B, T), of masked documents.

        Document i begins at the flat index at[i] and has the number numbers[i]; the rest is padding.
        """
        lengths = self._lengths(documents) - 1  # the last token of a document is only a label
        source, target = _ranges(self._offsets[documents], lengths), _ranges(at, lengths)
        input_ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        laid = np.zeros(shape, np.int32)
        input_ids.flat[target] = self._tokens[source]
        labels.flat[target] = np.where(self._mask[source + 1], self._tokens[source + 1].astype(np.int64), IGNORE)
        laid.flat[target] = np.repeat(numbers, lengths)
        self._release()
        return [torch.from_numpy(x) for x in (input_ids, labels, laid)]

    def _release(self) -> None:
        """Unmaps the pages read so far; the system keeps them cached. Without it the memory that a process is
        seen to use would grow to the size of the file within an epoch."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for array in self._mapped.values():
                array._mmap.madvise(mmap.MADV_DONTNEED)


class PretrainData(_Rows):
    """Documents for pretraining, shuffled anew each epoch, end to end in rows of max_seq_len tokens.

    Every token of every <s>text</s> but the <s> is a label exactly once an epoch. With `isolate`, `documents`
    tells the model where each one begins, so that attention can stay inside; the labels are the same either way,
    so losses compare. workers: threads that tokenize at the first use (default: all cores).
    Raises: ValueError if the file is missing, unusable, or changes meanwhile.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        max_seq_len: int,
        *,
        isolate: bool = False,
        seed: int = 1337,
        workers: int | None = None,
    ) -> None:
        super().__init__(path, tokenizer, _Documents(), max_seq_len, seed, workers)
        self.isolate = isolate
        num_inputs = len(self._tokens) - 1  # nothing follows the very last token
        num_documents = len(self._offsets) - 1
        self._describe(-(-num_inputs // max_seq_len), num_inputs, len(self._tokens) - num_documents)

    def rows(self, epoch: int, start: int, stop: int) -> Batch:
        """Returns rows [start, stop) of the epoch; those past num_rows are padding."""
        order, ends = self._layout(epoch)
        T = self.max_seq_len  # noqa: N806
        first = min(start * T, ends[-1])
        last = min(stop * T + 1, ends[-1])  # one more: the last label
        # The documents that stream[first:last] runs through, and which part of each.
        span = slice(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1)
        begins = ends[span] - self._lengths(order[span])  # in the stream
        skipped = np.maximum(first - begins, 0)
        counts = np.minimum(ends[span], last) - begins - skipped
        num_inputs = max(last - first - 1, 0)

        stream = np.zeros((stop - start) * T + 1, np.int64)
        stream[: last - first] = self._tokens[_ranges(self._offsets[order[span]] + skipped, counts)]
        input_ids, labels = stream[:-1], stream[1:].copy()
        labels[labels == self.bos_id] = IGNORE
        labels[num_inputs:] = IGNORE
        input_ids[num_inputs:] = 0
        documents = None
        if self.isolate:
            documents = np.zeros((stop - start, T), np.int32)
            documents.flat[:num_inputs] = np.repeat(np.arange(1, len(counts) + 1), counts)[:num_inputs]
            documents = np.where(documents > 0, documents - documents[:, :1] + 1, 0)
        self._release()
        return Batch(
            torch.from_numpy(input_ids.reshape(-1, T)),
            torch.from_numpy(labels.reshape(-1, T)),
            None if documents is None else torch.from_numpy(documents),
        )

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents in the epoch's order, and where each ends in its stream of tokens."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = self._random(epoch).permutation(np.arange(len(self._offsets) - 1, dtype=np.uint32))
            ends = self._lengths(order)
            self._shuffled = epoch, order, np.cumsum(ends, out=ends)
        return self._shuffled[1:]


class SFTData(_Rows):
    """Conversations for fine-tuning, packed whole into rows of max_seq_len tokens; the rows are shuffled each epoch.

    Labels are the tokens of every answer and its </s>; `documents` keeps the conversations of a row apart. Which
    conversations share a row depends on the seed and stays the same in all epochs. Over-long ones are cut, see
    cut_conversation. workers: threads that tokenize at the first use (default: all cores).
    Raises: ValueError if the file is missing, unusable, or changes meanwhile.
    """

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, max_seq_len: int, *, seed: int = 1337, workers: int | None = None
    ) -> None:
        super().__init__(path, tokenizer, _Conversations(max_seq_len), max_seq_len, seed, workers)
        inputs = np.diff(self._offsets) - 1  # the last token of a conversation is only a label
        self._samples, self._row_starts = pack(inputs, max_seq_len, self._random())
        self._describe(len(self._row_starts) - 1, int(inputs.sum()), int(np.count_nonzero(self._mask)))

    def rows(self, epoch: int, start: int, stop: int) -> Batch:
        """Returns rows [start, stop) of the epoch; those past num_rows are padding."""
        return self._batch(self._order(epoch)[start:stop], stop - start)

    def _batch(self, row: np.ndarray, size: int) -> Batch:
        """Returns the rows with these numbers and padding, `size` rows in all."""
        T = self.max_seq_len  # noqa: N806
        counts = self._row_starts[row + 1] - self._row_starts[row]
        samples = self._samples[_ranges(self._row_starts[row], counts)]
        lengths = self._lengths(samples) - 1
        # Every sample goes behind those before it in its row.
        before = np.cumsum(lengths) - lengths
        first = np.repeat(np.cumsum(counts) - counts, counts)  # of the samples of the same row
        at = np.repeat(np.arange(len(row)) * T, counts) + before - before[first]
        return Batch(*self._lay((size, T), samples, at, np.arange(len(samples)) - first + 1))


class DPOData(_Rows):
    """Preference pairs: the prompt with the chosen and with the rejected answer; shuffled each epoch.

    A row is a pair, two sequences as the chat template makes them, up to the </s> of the last answer, whose tokens
    are the only labels. Over-long ones are cut alike on both sides, see cut_pair. num_tokens and num_bytes count the
    answers of both sides. workers: threads that tokenize at the first use (default: all cores).
    Raises: ValueError if the file is missing, unusable, or changes meanwhile.
    """

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, max_seq_len: int, *, seed: int = 1337, workers: int | None = None
    ) -> None:
        super().__init__(path, tokenizer, _Pairs(max_seq_len), max_seq_len, seed, workers)
        self._describe((len(self._offsets) - 1) // 2, None, int(np.count_nonzero(self._mask)))
        self.longest = int(np.diff(self._offsets).max()) - 1  # inputs of the longest sequence

    def rows(self, epoch: int, start: int, stop: int) -> PairBatch:
        """Returns pairs [start, stop) of the epoch's order; those past num_rows are padding."""
        return self._batch(self._order(epoch)[start:stop], stop - start)

    def in_order(self, start: int, stop: int) -> PairBatch:
        """Returns pairs [start, stop) in the order of the file, numbered as in `rows`; padding past num_rows.

        What is computed once per pair, such as log-probabilities of the reference, can so be looked up by `pairs`.
        """
        return self._batch(np.arange(start, min(stop, self.num_rows)), stop - start)

    def num_answer_tokens(self) -> np.ndarray:
        """Returns how many labels every sequence has, (2 * num_rows,) int64: chosen and rejected of a pair in turn."""
        before = np.concatenate([[0], np.cumsum(self._mask, dtype=np.int64)])[self._offsets]
        self._release()
        return np.diff(before)

    def _batch(self, pair: np.ndarray, size: int) -> PairBatch:
        """Returns the pairs with these numbers and padding, `size` pairs in all."""
        sequences = np.concatenate([2 * pair, 2 * pair + 1])
        T = int(self._lengths(sequences).max(initial=2)) - 1  # noqa: N806
        row = np.arange(len(pair))
        at = np.concatenate([row, size + row]) * T
        pairs = np.full(size, -1, np.int64)
        pairs[: len(pair)] = pair
        ones = np.ones(len(sequences), np.int32)
        return PairBatch(*self._lay((2 * size, T), sequences, at, ones), torch.from_numpy(pairs))


class MixedData(_Shuffled):
    """Conversations with some of an earlier stage among them, so that what that stage taught is not forgotten.

    Of an epoch's rows, `share` come from `replay`: M = share / (1 - share) times the rows of `data`, at least one.
    The others are all the rows of `data`. The replayed ones go through `replay` in its own shuffled order, on from
    where the epoch before stopped, so that over the epochs each has its turn. num_tokens and num_bytes are an
    epoch's average, as the rows of `replay` differ in them.
    Raises: ValueError if share is not between 0 and 1, or the two differ in seed or max_seq_len.
    """

    def __init__(self, data: SFTData, replay: SFTData, share: float) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share {share}: the part of the rows that is replayed must be above 0 and below 1")
        for name in ("seed", "max_seq_len"):
            if getattr(data, name) != getattr(replay, name):
                raise ValueError(f"{name} {getattr(data, name)} and {getattr(replay, name)}: open both with the same")
        self.data, self.replay, self.share = data, replay, share
        self.seed, self.max_seq_len = data.seed, data.max_seq_len
        self._num_replayed = max(1, round(data.num_rows * share / (1 - share)))
        self.num_rows = data.num_rows + self._num_replayed
        passes = self._num_replayed / replay.num_rows  # over `replay` in an epoch
        self.num_tokens = data.num_tokens + round(passes * replay.num_tokens)
        self.num_bytes = data.num_bytes + round(passes * replay.num_bytes)
        self.fingerprint = f"{data.fingerprint}; {share} of the rows from {replay.fingerprint}"
        figures = {"rows": self.num_rows, "target_tokens": self.num_tokens, "target_bytes": self.num_bytes}
        self.stats: dict = figures | {"share": share, "data": data.stats, "replay": replay.stats}

    def rows(self, epoch: int, start: int, stop: int) -> Batch:
        """Returns rows [start, stop) of the epoch; those past num_rows are padding."""
        row = self._order(epoch)[start:stop]  # the rows of `data`, then the replayed ones, have these numbers
        is_new = row < self.data.num_rows
        num_new = int(is_new.sum())
        new = self.data._batch(row[is_new], num_new)
        replayed = self._replayed(epoch, row[~is_new] - self.data.num_rows)
        old = self.replay._batch(replayed, stop - start - num_new)  # with the padding
        place = np.argsort(np.argsort(~is_new, kind="stable"))  # of every row among `new`, then `old`
        place = torch.from_numpy(np.concatenate([place, np.arange(len(row), stop - start)]))
        return Batch(*(torch.cat(both)[place] for both in zip(new, old, strict=True)))

    def _replayed(self, epoch: int, index: np.ndarray) -> np.ndarray:
        """Returns the numbers in `replay` of these of the epoch's replayed rows."""
        passes, at = np.divmod(epoch * self._num_replayed + index, self.replay.num_rows)
        rows = np.empty_like(at)
        for number in np.unique(passes):
            rows[passes == number] = self.replay._order(int(number))[at[passes == number]]
        return rows


def pack(lengths: np.ndarray, capacity: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns (items, starts): row r holds the items items[starts[r] : starts[r + 1]], their lengths fit capacity.

    Best fit decreasing: the longest first, each into the row with the least space that takes it. All items of
    one length are placed together, so the time grows with the different lengths, not with the items. `random`
    decides which of equally long items go together.
    Raises: ValueError if an item is longer than capacity or empty.
    Source: Johnson, Near-optimal bin packing algorithms (1973); at most 22% more rows than the best packing.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit rows of {capacity}")
    order = random.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    different, firsts = np.unique(lengths[order], return_index=True)
    row_of = np.empty(len(lengths), np.int64)
    rows_by_space = defaultdict(list)  # space left in a row: [arrays of row numbers]
    num_rows = 0
    for length, items in zip(different[::-1].tolist(), np.split(order, firsts[1:])[::-1], strict=True):
        for space in [*sorted(space for space in rows_by_space if space >= length), capacity]:
            each = space // length  # once a row is the best fit it stays so until it is too full for this length
            wanted = -(-len(items) // each)
            if space == capacity:
                rows = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            else:
                rows, spare = np.split(np.concatenate(rows_by_space.pop(space)), [wanted])
                if len(spare):
                    rows_by_space[space] = [spare]
            placed, items = np.split(items, [len(rows) * each])
            row_of[placed] = np.repeat(rows, each)[: len(placed)]
            in_last = len(placed) - (len(rows) - 1) * each  # the last row may take fewer
            rows_by_space[space - each * length].append(rows[:-1])
            rows_by_space[space - in_last * length].append(rows[-1:])
            if not len(items):
                break
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return np.argsort(row_of, kind="stable"), starts


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns starts[0], starts[0] + 1, ... (counts[0] numbers), then starts[1], ...: many slices as one index."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(counts.sum())
