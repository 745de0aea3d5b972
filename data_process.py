"""Makes training files: the demo data, or your own files filtered, deduplicated and converted.

    python data_process.py demo
    python data_process.py pretrain --input corpus.jsonl --output dataset/pretrain_data.csv
    python data_process.py sft      --input chats/ more.jsonl.gz --output dataset/sft_data.csv
    python data_process.py dpo      --input pairs.jsonl --output dataset/dpo/train_data.json

Reads .jsonl, .json, .csv, .txt and .gz of these in all formats of dataset/README.md; writes what the training
scripts read. Next: train_tokenizer.py, or 1-pretrain.py with the tokenizer that comes with the code.

生成训练数据：`demo` 由已安装的中文语料包生成全部演示数据；`pretrain`、`sft`、`dpo` 对自己的文件做过滤、去重和格式转换。
支持 .jsonl .json .csv .txt 及其 .gz，格式见 dataset/README.md；下一步：train_tokenizer.py 或 1-pretrain.py。
"""

import argparse
import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from model.checkpoint import atomic_write
from model.cli import ROOT, non_negative_int, number, positive_int, run_main
from model.dataset import FORMATS, MAX_RECORD_BYTES, read_records, to_messages, to_pair, to_text
from model.tokenizer import load_tokenizer

BATCH_BYTES = 1 << 20
BATCH_RECORDS = 1000
SAMPLE_RECORDS = 2000  # tokens are counted on about this many records
SHOWN_ERRORS = 20
BOM = codecs.BOM_UTF8
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)

# ---------------------------------------------------------------- 1. writing


class Output:
    """A .csv, .jsonl or .json file that appears, whole, when `stack` closes without an error, if it has rows."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        self.num_rows = 0
        self.stack = stack

    def write(self, row: bytes, header: bytes) -> None:
        """Adds one row made by encode_row; `header` goes before the first."""
        if not self.num_rows:
            self.file = self.stack.enter_context(atomic_write(self.path))
            self.is_list = self.path.suffix == ".json"
            self.file.write(b"[\n" if self.is_list else header)
        elif self.is_list:
            self.file.write(b",\n")
        self.file.write(row)
        self.num_rows += 1

    def finish(self) -> None:
        """Ends the list of a .json file."""
        if self.num_rows and self.is_list:
            self.file.write(b"\n]\n")


def csv_line(values: list[str]) -> bytes:
    """One CSV row, ended by CRLF as v1's: csv and pandas read back every string exactly."""
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue().encode("utf-8")


def csv_header(record: dict, suffix: str) -> bytes:
    """The line that goes before records like this one."""
    return csv_line(list(record)) if suffix == ".csv" else b""


def encode_row(record: dict, suffix: str) -> bytes:
    """A record as the bytes of a .csv, .jsonl or .json file. Raises ValueError on half a surrogate pair."""
    if suffix == ".csv":
        values = record.values()
        return csv_line([v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values])
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + (b"\n" if suffix == ".jsonl" else b"")


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raises ValueError if one of the files exists and may not be replaced."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{', '.join(existing)} already there: add --overwrite or give another --output")


# ---------------------------------------------------------------- 2. the demo files

DEMO_FILES = {
    "tokenizer_train.jsonl": "text for train_tokenizer.py",
    "pretrain_data.csv": "pretraining documents",
    "pretrain_val.csv": "held-out documents",
    "sft_data.csv": "instructions, single- and multi-turn",
    "sft_data_single.csv": "the single-turn ones of sft_data.csv",
    "sft_val.csv": "facts of sft_data.csv asked in held-out wordings",
    "sft_val_new.csv": "facts that sft_data.csv does not have",
    "general_val.csv": "the two before without small talk",
    "dpo/train_data.json": "preference pairs",
    "dpo/val_data.json": "preference pairs in held-out wordings",
    "lora_data.csv": "another persona and how to use this toolkit, for LoRA",
    "lora_val.csv": "the facts of lora_data.csv asked in held-out wordings",
}


def demo(args: argparse.Namespace) -> None:
    """Writes the records that scripts/demo_data.py prints to the files they name."""
    paths = {name: Path(args.output) / name for name in DEMO_FILES}
    refuse_existing(list(paths.values()), args.overwrite)
    command = [sys.executable, str(ROOT / "scripts/demo_data.py"), f"--max_sft={args.max_sft}", f"--seed={args.seed}"]
    with contextlib.ExitStack() as stack:
        outputs = {name: Output(path, stack) for name, path in paths.items()}
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as generator:
            for line in tqdm(generator.stdout, desc="demo data", unit=" records", mininterval=0.5):
                item = json.loads(line)
                output, record = outputs[item["file"]], item["record"]
                output.write(encode_row(record, output.path.suffix), csv_header(record, output.path.suffix))
        if generator.returncode:
            raise SystemExit(generator.returncode)  # it has said why
        for output in outputs.values():
            output.finish()
    for name, use in DEMO_FILES.items():
        print(f"{outputs[name].num_rows:>8,} rows {paths[name].stat().st_size / 1e6:6.1f} MB  {paths[name]}  {use}")


# ---------------------------------------------------------------- 3. reading, in batches for the worker processes


class Batch(NamedTuple):
    """A part of an input file: whole lines still to be parsed, or records that had to be read in order."""

    path: Path
    lines: bytes
    first_line: int  # number of the first of `lines`
    records: list[tuple[int, dict]]  # (line number, record)
    bad: list[tuple[int, str]]  # (line number, what is wrong)
    num_bytes: int  # of the input file, as far as it was read for this batch


def input_files(paths: list[str]) -> list[Path]:
    """The files to read, those of a folder in sorted order. Raises ValueError when there are none."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"--input {path}: no such file or folder")
        found = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
        found = [p for p in found if kind_of(p) in FORMATS]
        if not found:
            raise ValueError(f"--input {path}: no file ending in {', '.join(FORMATS)} or .gz of these")
        files += found
    return list(dict.fromkeys(files))


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file: that before .gz if there is one."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def read_batches(path: Path) -> Iterator[Batch]:
    """A file in batches of about a megabyte. Raises ValueError if it cannot be read."""
    try:
        with path.open("rb") as raw, (gzip.open(raw) if path.suffix == ".gz" else raw) as file:
            if kind_of(path) == ".txt" or (kind_of(path) == ".jsonl" and not holds_array(file)):
                yield from read_line_batches(path, file, raw)
                return
        yield from read_record_batches(path)
    except OSError as error:  # as an OSError it would be taken for one of the output
        raise ValueError(f"--input {path}: {error.strerror}") from None


def holds_array(file: BinaryIO) -> bool:
    """Whether a JSON file is one array instead of an object a line."""
    try:
        start = file.read(100).removeprefix(BOM).lstrip()
        file.seek(0)
    except GZIP_ERRORS:
        return False
    return start.startswith(b"[")


def read_line_batches(path: Path, file: BinaryIO, raw: BinaryIO) -> Iterator[Batch]:
    """Whole lines, unparsed: parsing them is the workers' job."""
    first_line, position = 1, 0
    while True:
        bad, lines = [], b""
        try:
            lines = file.read(BATCH_BYTES)
            lines += file.readline(MAX_RECORD_BYTES)  # a longer line is damage and must not fill the memory
        except GZIP_ERRORS as error:
            bad = [(first_line, f"damaged gzip: {error}; what follows is lost")]
        if lines or bad:
            yield Batch(path, lines, first_line, [], bad, raw.tell() - position)
        if not lines or bad:
            return
        position = raw.tell()
        first_line += lines.count(b"\n")


def read_record_batches(path: Path) -> Iterator[Batch]:
    """Records of a .csv or .json file, whose borders only a reading from the start can find."""
    bad: list[tuple[int, str]] = []
    records: list[tuple[int, dict]] = []
    positions = [0, 0]  # bytes read at the last batch, and now
    size = 0

    def on_bytes(position: int) -> None:
        positions[1] = position

    def batch() -> Batch:
        made = Batch(path, b"", 0, records.copy(), bad.copy(), positions[1] - positions[0])
        records.clear(), bad.clear()
        positions[0] = positions[1]
        return made

    for line, record in read_records(path, lambda _, line, reason: bad.append((line, reason)), on_bytes):
        records.append((line, record))
        size += sum(len(value) for value in record.values() if isinstance(value, str))
        if len(records) == BATCH_RECORDS or size > BATCH_BYTES:
            yield batch()
            size = 0
    yield batch()


def batch_records(batch: Batch, bad: list[tuple[int, str]]) -> Iterator[tuple[int, dict]]:
    """(line number, record) of a batch; what cannot be parsed goes to `bad`."""
    yield from batch.records
    kind = kind_of(batch.path)
    for line, text in enumerate(batch.lines.split(b"\n"), batch.first_line):
        if text.strip():
            try:
                yield line, parse_line(text.rstrip(b"\r"), kind)
            except ValueError as error:
                bad.append((line, str(error)))


def parse_line(text: bytes, kind: str) -> dict:
    """One line of a .jsonl or .txt file as a record. Raises ValueError, `kind of fault: details`."""
    try:
        line = text.removeprefix(BOM).decode("utf-8")
        record = {"text": line} if kind == ".txt" else json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"bad UTF-8: byte {error.start + 1} of the line; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"not an object: {line[:80]}")
    return record


# ---------------------------------------------------------------- 4. what to keep

CHINESE = re.compile("[\u4e00-\u9fff]+")


class Drop(Exception):
    """A sound record that the filters leave out; the message is the reason."""


class Made(NamedTuple):
    """A record as it is written, its text, and what decides whether it is held out."""

    record: dict
    text: str
    prompt: str


def check(name: str, text: str, low: int, high: int, min_chinese: float) -> None:
    """Raises Drop if a text is too short or long (characters), or not Chinese enough (share)."""
    if len(text) < low:
        raise Drop(f"{name} under {low} characters")
    if len(text) > high:
        raise Drop(f"{name} over {high} characters")
    if min_chinese and 1 - len(CHINESE.sub("", text)) / len(text) <= min_chinese:
        raise Drop(f"{name} not over {min_chinese:.0%} Chinese")


def make_pretrain(record: dict, args: argparse.Namespace) -> Made:
    """A pretraining document: {"text"}."""
    text = to_text(record)
    check("text", text, args.min_length, args.max_length, args.min_chinese)
    return Made({"text": text}, text, text)


def make_sft(record: dict, args: argparse.Namespace) -> Made:
    """An instruction {"history", "q", "a", "system"}: the last turn is filtered, as in v1."""
    messages = to_messages(record)
    contents = [message["content"] for message in messages]
    system = contents.pop(0) if messages[0]["role"] == "system" else ""
    if args.turns != "all" and (args.turns == "multi") != (len(contents) > 2):
        raise Drop("multi-turn" if args.turns == "single" else "single-turn")
    *earlier, question, answer = contents
    check("question", question, args.min_question, args.max_question, args.min_chinese)
    check("answer", answer, args.min_answer, args.max_answer, args.min_chinese)
    history = [earlier[i : i + 2] for i in range(0, len(earlier), 2)]
    return Made({"history": history, "q": question, "a": answer, "system": system}, "\n".join(contents), contents[0])


def make_dpo(record: dict, args: argparse.Namespace) -> Made:
    """A preference pair {"prompt", "chosen", "rejected"}; the prompt is a string if it is one question."""
    pair = to_pair(record)
    messages, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    texts = [message["content"] for message in messages] + [chosen, rejected]
    check("longest text", max(texts, key=len), 1, args.max_length, 0)
    prompt = texts[0] if len(messages) == 1 else messages
    return Made({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "\n".join(texts), texts[-3])


class Result(NamedTuple):
    """What is left of a batch. `rows`, `hashes`, `held_out` and `lengths` go by kept record."""

    header: bytes  # of a CSV file with such rows
    rows: list[bytes]
    hashes: np.ndarray  # uint64
    held_out: list[bool]
    lengths: list[int]  # characters
    dropped: Counter
    bad: list[tuple[int, str]]  # (line number, what is wrong)
    sample: list[tuple[int, str]]  # (hash, text): a fair sample of the kept


def process_batch(args: argparse.Namespace, batch: Batch) -> Result:
    """Parses, filters and encodes a batch; runs in a worker process."""
    header = b""
    result = Result(b"", [], None, [], [], Counter(), list(batch.bad), [])
    hashes, texts = [], []
    seed = str(args.seed).encode()
    for line, record in batch_records(batch, result.bad):
        try:
            made = args.make(record, args)
            row = encode_row(made.record, args.suffix)
        except Drop as reason:
            result.dropped[str(reason)] += 1
        except ValueError as error:
            result.bad.append((line, str(error)))
        else:
            header = header or csv_header(made.record, args.suffix)
            result.rows.append(row)
            result.held_out.append(hash64(made.prompt.encode(), seed) < args.val_share * 2**64)
            result.lengths.append(len(made.text))
            hashes.append(hash64(row))
            texts.append(made.text)
    result.bad.sort()
    sample = sorted(zip(hashes, texts, strict=True))[: SAMPLE_RECORDS // 10]
    return result._replace(header=header, hashes=np.array(hashes, dtype=np.uint64), sample=sample)


def hash64(data: bytes, key: bytes = b"") -> int:
    """64 bits of blake2b: among 100 million records, one pair in 3,700 runs meets by chance."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest())


class SeenHashes:
    """The hashes met so far, 8 bytes each: sorted runs in 16 shards, merged shard by shard."""

    def __init__(self) -> None:
        self.shards: list[list[np.ndarray]] = [[] for _ in range(16)]

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Takes uint64 hashes (N,) and returns bool (N,): True where a hash is met for the first time."""
        unique, first = np.unique(hashes, return_index=True)
        is_new = np.zeros(len(hashes), dtype=bool)
        borders = np.searchsorted(unique, np.arange(1, 16, dtype=np.uint64) << np.uint64(60))
        for runs, part, index in zip(self.shards, np.split(unique, borders), np.split(first, borders), strict=True):
            fresh = np.ones(len(part), dtype=bool)
            for run in runs:
                place = np.minimum(np.searchsorted(run, part), len(run) - 1)
                fresh &= run[place] != part
            is_new[index[fresh]] = True
            if fresh.any():
                runs.append(part[fresh])
            while len(runs) > 1 and len(runs[-2]) < 2 * len(runs[-1]):
                last = runs.pop()
                runs[-1] = np.sort(np.concatenate([runs[-1], last]), kind="stable")
        return is_new


# ---------------------------------------------------------------- 5. the run


class Totals:
    """Counts of a run, and the table at its end."""

    def __init__(self) -> None:
        self.kept = self.held_out = self.bad = 0
        self.dropped: Counter = Counter()  # by reason
        self.lengths: Counter = Counter()  # characters: records
        self.sample: list[tuple[int, str]] = []

    def table(self, outputs: list[Output], tokenizer_dir: str | None) -> str:
        read = self.kept + sum(self.dropped.values())
        rows = [("read", read), ("kept", self.kept), ("  of them held out", self.held_out)]
        rows += [(f"dropped: {reason}", count) for reason, count in self.dropped.most_common()]
        lines = [f"{name:<42}{count:>14,} {count / read:>7.1%}" for name, count in rows]
        lengths = np.array(sorted(self.lengths))
        ranks = np.cumsum([self.lengths[length] for length in lengths])
        points = [lengths[np.searchsorted(ranks, share * self.kept)] for share in (0.05, 0.25, 0.5, 0.75, 0.95)]
        lines.append(f"characters of a record: 5% {points[0]}, 25% {points[1]}, median {points[2]}, "
                     f"75% {points[3]}, 95% {points[4]}, longest {lengths[-1]}")
        lines.append(self.tokens(int(lengths @ np.diff(ranks, prepend=0)), tokenizer_dir))
        return "\n".join(lines + [f"wrote {o.path} ({o.num_rows:,} records)" for o in outputs if o.num_rows])

    def tokens(self, num_chars: int, tokenizer_dir: str | None) -> str:
        """The number of tokens, from the characters per token of a sample."""
        try:
            tokenizer = load_tokenizer(tokenizer_dir)
        except ValueError as error:
            return f"characters: {num_chars:,}; tokens not counted: {error}"
        texts = [text for _, text in self.sample]
        ratio = sum(map(len, texts)) / max(1, sum(map(len, tokenizer.encode_batch(texts))))
        about = "" if len(texts) == self.kept else f" (estimated on {len(texts):,} records)"
        return f"characters: {num_chars:,}; tokens: {num_chars / ratio:,.0f}, {ratio:.2f} characters each{about}"


def results(files: list[Path], args: argparse.Namespace) -> Iterator[tuple[Batch, Result]]:
    """Every batch of the files with its result, in the order of the input for any number of workers."""
    work = partial(process_batch, args)
    batches = (batch for path in files for batch in read_batches(path))
    if args.workers == 1:
        yield from ((batch, work(batch)) for batch in batches)
        return
    with ProcessPoolExecutor(args.workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append((batch._replace(lines=b"", records=[]), pool.submit(work, batch)))
            if len(waiting) > 2 * args.workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def process(args: argparse.Namespace) -> None:
    """Reads all inputs, filters, removes duplicates, and writes --output and its held-out part."""
    output = Path(args.output)
    if output.suffix not in args.suffixes:
        raise ValueError(f"--output {output}: its name must end in {' or '.join(args.suffixes)}")
    args.suffix = output.suffix
    stem = "val_data" if output.stem == "train_data" else output.stem.removesuffix("_data") + "_val"
    val_path = output.with_name(stem + output.suffix)
    refuse_existing([output, val_path] if args.val_share else [output], args.overwrite)
    files = input_files(args.input)
    if {path.resolve() for path in files} & {output.resolve(), val_path.resolve()}:
        raise ValueError(f"--output {output} is one of the input files: give another name")
    totals, seen = Totals(), SeenHashes()
    with contextlib.ExitStack() as stack:
        outputs = [Output(output, stack), Output(val_path, stack)]
        with tqdm(total=sum(p.stat().st_size for p in files), unit="B", unit_scale=True, mininterval=0.5) as bar:
            for batch, result in results(files, args):
                report(batch.path, result.bad, totals, args.strict)
                add(result, seen, totals, outputs)
                bar.update(min(batch.num_bytes, bar.total - bar.n))
            bar.update(bar.total - bar.n)
        if not outputs[0].num_rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in totals.dropped.most_common(3))
            raise ValueError(f"nothing usable in the input ({reasons or 'no records at all'})")
        for out in outputs:
            out.finish()
    print(totals.table(outputs, args.tokenizer_dir))


def report(path: Path, bad: list[tuple[int, str]], totals: Totals, strict: bool) -> None:
    """Counts what was wrong with a file and shows the first of it; raises ValueError if `strict`."""
    for line, reason in bad:
        if strict:
            raise ValueError(f"{path}:{line}: {reason}")
        totals.bad += 1
        totals.dropped["broken: " + reason.split(":")[0]] += 1
        if totals.bad <= SHOWN_ERRORS:
            tqdm.write(f"{path}:{line}: {reason}", file=sys.stderr)
        elif totals.bad == SHOWN_ERRORS + 1:
            tqdm.write("more broken records are only counted", file=sys.stderr)


def add(result: Result, seen: SeenHashes, totals: Totals, outputs: list[Output]) -> None:
    """Writes the records of a batch that were not met before and counts everything."""
    is_new = seen.add(result.hashes)
    for row, new, held_out, length in zip(result.rows, is_new, result.held_out, result.lengths, strict=True):
        if new:
            outputs[held_out].write(row, result.header)
            totals.held_out += held_out
            totals.lengths[length] += 1
    totals.kept += int(is_new.sum())
    totals.dropped += result.dropped + Counter({"duplicate": len(is_new) - int(is_new.sum())})
    totals.sample = sorted(totals.sample + result.sample)[:SAMPLE_RECORDS]


# ---------------------------------------------------------------- 6. the command line


def add_process_command(
    commands: argparse._SubParsersAction, name: str, make: Callable, default: str, suffixes: tuple[str, ...], text: str
) -> argparse.ArgumentParser:
    """The flags that pretrain, sft and dpo share."""
    sub = commands.add_parser(name, help=text, description=text)
    sub.add_argument("--input", nargs="+", required=True, metavar="PATH",
                     help=f"files or folders: {' '.join(FORMATS)}, and .gz of these")
    sub.add_argument("--output", default=ROOT / default, help=f"{' or '.join(suffixes)} file (default: {default})")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing output")
    sub.add_argument("--val_share", type=number(float, 0, 0.5), default=0.0,
                     help="share of records held out by a hash of the text or question: into pretrain_val.csv for "
                          "pretrain_data.csv, dpo/val_data.json for dpo/train_data.json, X_val.csv for X.csv")
    sub.add_argument("--seed", type=int, default=1337, help="of the choice of held-out records (default: 1337)")
    sub.add_argument("--strict", action="store_true", help="stop at the first broken record and write nothing")
    sub.add_argument("--workers", type=positive_int, default=os.cpu_count(), help="processes (default: all cores)")
    sub.add_argument("--tokenizer_dir", help="for the token count (default: model/minimind_tokenizer)")
    sub.set_defaults(run=process, make=make, suffixes=suffixes)
    return sub


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    files = "".join(f"\n  {name:<22}{use}" for name, use in DEMO_FILES.items())
    sub = commands.add_parser(
        "demo", help="all demo files, from the text packages in requirements-demo.txt",
        description=f"Writes these files under --output:{files}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--output", default=ROOT / "dataset", help="folder (default: dataset/ of this repository)")
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")
    sub.add_argument("--max_sft", type=number(int, 500), default=5000,
                     help="about how many instruction conversations (default: 5000)")
    sub.add_argument("--seed", type=int, default=1337, help="of the choice of facts and wordings (default: 1337)")
    sub.set_defaults(run=demo)

    def length(name: str, kind: Callable, default: int, what: str) -> None:
        sub.add_argument(name, type=kind, default=default, help=f"characters of {what} (default: {default})")

    chinese = "larger share of Chinese characters than this; 0 keeps all languages (default: %(default)s)"
    sub = add_process_command(commands, "pretrain", make_pretrain, "dataset/pretrain_data.csv", (".csv", ".jsonl"),
                              "pretraining or tokenizer text")
    length("--min_length", non_negative_int, 1, "a text")
    length("--max_length", positive_int, 512, "a text")
    sub.add_argument("--min_chinese", type=number(float, 0, 1), default=0.0, help=f"keep texts with a {chinese}")

    sub = add_process_command(commands, "sft", make_sft, "dataset/sft_data.csv", (".csv",), "instructions")
    sub.add_argument("--turns", choices=("all", "single", "multi"), default="all",
                     help="which conversations to keep (default: all)")
    length("--min_question", non_negative_int, 10, "the last question")
    length("--max_question", positive_int, 512, "the last question")
    length("--min_answer", non_negative_int, 5, "the last answer")
    length("--max_answer", positive_int, 512, "the last answer")
    sub.add_argument("--min_chinese", type=number(float, 0, 1), default=0.5,
                     help=f"keep conversations whose last question and answer both have a {chinese}")

    sub = add_process_command(commands, "dpo", make_dpo, "dataset/dpo/train_data.json", (".json", ".jsonl"),
                              "preference pairs")
    length("--max_length", positive_int, 4096, "prompt, chosen and rejected each")

    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
