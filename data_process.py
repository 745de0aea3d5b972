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
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from model.cli import ROOT, positive_int, run_main

DEMO_FILES = {
    "tokenizer_train.jsonl": "text for train_tokenizer.py",
    "pretrain_data.csv": "pretraining documents",
    "pretrain_val.csv": "held-out documents",
    "sft_data.csv": "instructions, single- and multi-turn",
    "sft_data_single.csv": "the single-turn ones of sft_data.csv",
    "sft_val.csv": "facts of sft_data.csv asked in held-out wordings",
    "sft_val_new.csv": "facts that sft_data.csv does not have",
    "dpo/train_data.json": "preference pairs",
    "dpo/val_data.json": "preference pairs in held-out wordings",
}
COLUMNS = {"text": ("text",), "q": ("history", "q", "a")}  # CSV header by a key of the record


class Output:
    """A data file written whole: into a temporary file beside it, renamed by `commit`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.rows = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.temporary.open("wb")

    def write(self, row: bytes, header: bytes = b"") -> None:
        """Adds one encoded row (see encode_row)."""
        if self.path.suffix == ".json":
            row = (b",\n" if self.rows else b"[\n") + row
        elif not self.rows:
            row = header + row
        self.file.write(row)
        self.rows += 1

    def commit(self) -> None:
        if self.path.suffix == ".json":
            self.file.write(b"\n]\n" if self.rows else b"[]\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Removes the temporary file; does nothing after commit."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def csv_line(values: list[str]) -> bytes:
    """One CSV row with CRLF, as v1 wrote; quoted so that the csv module and pandas read it back exactly."""
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue().encode("utf-8")


def encode_row(record: dict, suffix: str) -> bytes:
    """A record as bytes for a file of this suffix (.csv, .jsonl, .json)."""
    if suffix == ".csv":
        columns = COLUMNS["text" if "text" in record else "q"]
        values = [record[column] for column in columns]
        return csv_line([v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values])
    text = json.dumps(record, ensure_ascii=False).encode("utf-8")
    return text + b"\n" if suffix == ".jsonl" else text


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raises ValueError if one of the files exists and may not be replaced."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{', '.join(existing)} exists already: add --overwrite, or give another --output")


def demo(args: argparse.Namespace) -> None:
    """Writes the demo files that scripts/demo_data.py prints."""
    folder = Path(args.output)
    paths = {name: folder / name for name in DEMO_FILES}
    refuse_existing(list(paths.values()), args.overwrite)
    command = [sys.executable, str(ROOT / "scripts/demo_data.py"), f"--max_sft={args.max_sft}", f"--seed={args.seed}"]
    outputs: dict[str, Output] = {}
    try:
        outputs = {name: Output(path) for name, path in paths.items()}
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as generator:
            for line in tqdm(generator.stdout, desc="demo data", unit=" records", mininterval=0.5):
                item = json.loads(line)
                output, record = outputs[item["file"]], item["record"]
                suffix = output.path.suffix
                header = csv_line(COLUMNS["text" if "text" in record else "q"]) if suffix == ".csv" else b""
                output.write(encode_row(record, suffix), header)
        if generator.returncode:
            raise SystemExit(generator.returncode)  # it has said why
        for output in outputs.values():
            output.commit()
    finally:
        for output in outputs.values():
            output.discard()
    for name, use in DEMO_FILES.items():
        print(f"{outputs[name].rows:>8,} rows  {paths[name].stat().st_size / 1e6:6.1f} MB  {paths[name]}  {use}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    files = "".join(f"\n  {name:<22}{use}" for name, use in DEMO_FILES.items())
    sub = commands.add_parser(
        "demo", help="all demo files, from the text packages in requirements-demo.txt",
        description=f"Writes these files under --output:{files}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--output", default=ROOT / "dataset", help="folder (default: dataset/ of this repository)")
    sub.add_argument("--max_sft", type=positive_int, default=5000, help="about how many instruction conversations")
    sub.add_argument("--seed", type=int, default=1337, help="of the choice of facts and wordings")
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")
    sub.set_defaults(run=demo)

    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
