"""Train the tokenizer: text in, byte-level BPE out.

Purpose: learns the pieces (tokens) that all other stages count in. A byte-level BPE starts from the 256
         bytes, so it can write any text, and joins the most frequent neighbours until its vocabulary is full.
Run:     python train_tokenizer.py                       (on the demo text of python data_process.py demo)
         python train_tokenizer.py --data_path my.jsonl more.txt.gz --output_dir out/my_tokenizer
         python train_tokenizer.py --check               (only the figures of a tokenizer, --tokenizer_dir)
Reads:   dataset/tokenizer_train.jsonl, {"text": ...} a line; or .csv with the header text, or .txt; .gz of these
Writes:  model/minimind_tokenizer/tokenizer.json, which holds all that counts; tokenizer_config.json,
         vocab.json and merges.txt for other programs
Next:    data_process.py, 1-pretrain.py. Weights fit only the tokenizer they were trained with.

训练分词器：输入文本，得到字节级 BPE。

用途：学习其余各阶段计数所用的词元（token）。字节级 BPE 从 256 个字节出发，因此能表示任何文本；
      它不断合并最常相邻的两个词元，直到词表填满。
运行：python train_tokenizer.py                       （用 python data_process.py demo 生成的演示文本）
      python train_tokenizer.py --data_path my.jsonl more.txt.gz --output_dir out/my_tokenizer
      python train_tokenizer.py --check               （只给出 --tokenizer_dir 中分词器的各项数字）
读取：dataset/tokenizer_train.jsonl，每行一个 {"text": ...}；也可以是表头为 text 的 .csv 或 .txt；均可用 .gz 压缩
写出：model/minimind_tokenizer/tokenizer.json，起作用的内容全在其中；另有 tokenizer_config.json、vocab.json
      和 merges.txt，供其他程序使用
下一步：data_process.py、1-pretrain.py。权重只与训练它的分词器相配。
"""

import argparse
import json
import random
import signal
import sys
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from model.checkpoint import atomic_write
from model.cli import ROOT, number, positive_float, run_main
from model.dataset import read_records, to_text
from model.tokenizer import DEFAULT_DIR, SPECIAL_TOKENS, Tokenizer, load_tokenizer, tokenizer_config

MIN_VOCAB = len(SPECIAL_TOKENS) + 256
SHOWN_BAD_LINES = 5

# For the check. Written for it, so that no tokenizer was trained on them.
SAMPLES = {
    "Chinese": "今天下午我去图书馆还书，路上遇到一位老同学。我们聊起中学时的生活，都觉得时间过得很快。"
    "他现在是一名医生，每天要看许多病人；我在一家公司做软件，经常加班。分手时他说：“有空来我家坐坐吧！”",
    "English": "The river had frozen early that year, and the children walked across it on their way to "
    "school. Nobody remembered a winter like this one. When the ice finally broke, people came out of their "
    "houses to watch, and some of them said that they would miss the quiet.",
    "code": "def mean(values: list[float]) -> float:\n    if not values:\n"
    "        raise ValueError('no values')\n    total = 0.0\n    for value in values:\n"
    "        total += value\n    return total / len(values)\n",
}
HARD_TEXTS = ["", " ", "\n\n \t\r\n", "a  b   c\u3000。", "№１２３ 2024-10-30 3.14", "\u202e \ufeff\x00\x7f"]
HARD_TEXTS += ["é e\u0301 \U0001f600 \U0001f469\u200d\U0001f467 \U00020bb7"]
HARD_TEXTS += [a + token + b for token in SPECIAL_TOKENS for a in ("", " ", "x") for b in ("", "y")]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.check:
        texts = sample(args.data_path, args.max_mb)
        save(train(texts, args.vocab_size), args.output_dir)
    return check(load_tokenizer(args.tokenizer_dir if args.check else args.output_dir), args.check_path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer on text, or check one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_data = ROOT / "dataset/tokenizer_train.jsonl"
    parser.add_argument("--data_path", type=Path, nargs="+", default=[default_data], help="training text")
    parser.add_argument("--vocab_size", type=number(int, MIN_VOCAB), default=6400, help="number of tokens")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_DIR, help="folder to write it to")
    parser.add_argument(
        "--max_mb",
        type=positive_float,
        default=32,
        help="MB of text to train on; of more, an even sample is taken. Takes up to 100 times this memory",
    )
    parser.add_argument("--check", action="store_true", help="only check the tokenizer in --tokenizer_dir")
    parser.add_argument("--tokenizer_dir", type=Path, default=DEFAULT_DIR, help="what to --check")
    parser.add_argument(
        "--check_path", type=Path, nargs="+", default=[], help="held-out text to check on too"
    )
    args = parser.parse_args(argv)
    if args.tokenizer_dir != DEFAULT_DIR and not args.check:
        parser.error("--tokenizer_dir goes with --check; a trained tokenizer is written to --output_dir")
    return args


# 1. Text


def sample(paths: list[Path], max_mb: float) -> list[str]:
    """Returns the texts of all files, or an even sample of at most `max_mb` (10**6 bytes) of them.

    One pass, in the memory of the sample: each text gets a random number in [0, 1) and is kept while that is
    below `share`, which is halved whenever the sample grows too large. The same input gives the same sample.
    Lines that cannot be used are named and skipped.
    Raises: ValueError if a file is missing or there is no text at all.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"no file {path}; make the demo text with `python data_process.py demo`")
    num_bad = 0

    def skip(path: Path, line_number: int, reason: str) -> None:
        nonlocal num_bad
        num_bad += 1
        if num_bad <= SHOWN_BAD_LINES:
            tqdm.write(f"skipped {path}:{line_number}: {reason}", file=sys.stderr)

    rng, share, kept, size, count = random.Random(1337), 1.0, [], 0, 0
    total_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="reading", dynamic_ncols=True) as bar:
        for path in paths:
            start = bar.n
            for line_number, record in read_records(path, skip, lambda n, start=start: bar.update(start + n - bar.n)):
                try:
                    text = to_text(record)
                except ValueError as error:
                    skip(path, line_number, str(error))
                    continue
                count += 1
                draw = rng.random()
                if draw >= share:
                    continue
                kept.append((draw, text))
                size += len(text.encode())
                while size > max_mb * 1e6 and len(kept) > 1:
                    share /= 2
                    kept = [(draw, text) for draw, text in kept if draw < share] or kept[:1]
                    size = sum(len(text.encode()) for _, text in kept)
    if num_bad:
        print(f"skipped {num_bad:,} lines that cannot be used", file=sys.stderr)
    if not kept:
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    print(f"using {len(kept):,} of {count:,} texts, {size / 1e6:.1f} MB")
    return [text for _, text in kept]


# 2. Training


def train(texts: list[str], vocab_size: int) -> str:
    """Returns the tokenizer.json of a byte-level BPE trained on `texts`, set up exactly like v1's.

    The same texts give the same JSON, whatever the number of threads.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    in_terminal = sys.stderr.isatty()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=in_terminal,
    )
    if not in_terminal:
        print(f"computing {vocab_size - MIN_VOCAB:,} merges", flush=True)  # the bar is for terminals only
    # The library does not look for Ctrl-C. Nothing is being written here, so let it end the process at once.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        backend.train_from_iterator(texts, trainer)
    finally:
        signal.signal(signal.SIGINT, handler)
    if backend.get_vocab_size() < vocab_size:
        print(f"the text gives only {backend.get_vocab_size():,} tokens of {vocab_size:,}: use more text")
    return backend.to_str(pretty=True)


# 3. Saving


def save(tokenizer_json: str, directory: Path) -> None:
    """Writes the tokenizer's four files into `directory`, tokenizer.json last, each whole or not at all."""
    tokenizer = Tokenizer(tokenizer_json)  # refuses what load_tokenizer would refuse
    try:
        old = load_tokenizer(directory).fingerprint
    except ValueError:
        old = tokenizer.fingerprint
    if old != tokenizer.fingerprint:
        print(f"replacing another tokenizer in {directory}: weights trained with it need the old files")
    model = json.loads(tokenizer_json)["model"]
    files = {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]),
        "tokenizer_config.json": json.dumps(tokenizer_config(), ensure_ascii=False, indent=2) + "\n",
        "tokenizer.json": tokenizer_json,
    }
    for name, content in files.items():
        with atomic_write(directory / name, "w") as file:
            file.write(content)


# 4. Check


def check(tokenizer: Tokenizer, paths: list[Path]) -> int:
    """Prints the tokenizer's figures, also on the files `paths`; returns 0, or 1 if a text is not kept."""
    print(f"\ntokenizer   {tokenizer.directory}")
    print(f"            {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:16]}")
    special = zip(tokenizer.special_tokens, tokenizer.special_ids, strict=True)
    print("special     " + "  ".join(f"{token} {i}" for token, i in special))
    letters = {letter: tokenizer.encode(letter) for letter in "ABCD"}
    print("choices     " + "  ".join(f"{k} {v[0] if len(v) == 1 else v}" for k, v in letters.items()))

    texts = {name: [text] for name, text in SAMPLES.items()}
    texts |= {str(path): sample([path], max_mb=8) for path in paths}
    print("characters per token")
    for name, group in texts.items():
        num_tokens = sum(map(len, tokenizer.encode_batch(group)))
        print(f"  {name:9} {sum(map(len, group)) / num_tokens:.2f}")

    all_texts = [text for group in [*texts.values(), HARD_TEXTS] for text in group]
    lost = [text for text in all_texts if not _round_trip(tokenizer, text)]
    for text in lost[:3]:
        print(f"  changed: {text[:60]!r} -> {tokenizer.decode(tokenizer.encode(text))[:60]!r}")
    print(f"round trip  {f'FAILED for {len(lost)} texts' if lost else 'ok'}")
    return 1 if lost else 0


def _round_trip(tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text)
    return tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.special_ids)


if __name__ == "__main__":
    run_main(main)
