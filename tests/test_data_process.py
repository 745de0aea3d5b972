"""data_process.py and scripts/demo_data.py: what they keep, drop, write and hold out."""

import csv
import gzip
import importlib.metadata
import importlib.util
import json
import random
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import data_process
from model.dataset import read_records, to_messages, to_pair

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("demo_data", ROOT / "scripts/demo_data.py")
demo_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo_data)
Fact, Idiom = demo_data.Fact, demo_data.Idiom

NASTY = [
    "back\\slash \\n \\frac{1}{2}", 'quo"te ""', "'", "comma, 半角", "line\nbreak", "cr\ralone", "crlf\r\nend", "NA",
    "null", "nan", "None", "  spaces  ", "\ttab", "emoji 👩‍👩‍👧", "\ufeffbom", "a\u2028b\x85c\x0bd",
    "=1+1", "#x", "-", "0012", "\x00nul",
]


def read_csv(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def run(command: str, source: Path | list[Path], output: Path, *flags: str) -> None:
    sources = [str(path) for path in (source if isinstance(source, list) else [source])]
    workers = () if "--workers" in flags else ("--workers", "1")
    data_process.main([command, "--input", *sources, "--output", str(output), *workers, *flags])


# ---------------------------------------------------------------- writing and reading back


def test_csv_round_trip_is_exact(tmp_path):
    out = tmp_path / "out.csv"
    run("pretrain", write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in NASTY]), out)
    assert [row["text"] for row in read_csv(out)] == NASTY
    assert [record["text"] for _, record in read_records(out, pytest.fail)] == NASTY
    assert out.read_bytes().startswith(b"text\r\n")
    again = tmp_path / "again.csv"
    run("pretrain", out, again)
    assert again.read_bytes() == out.read_bytes()


def test_sft_round_trip_is_exact(tmp_path):
    chats = [
        {"conversations": [
            {"role": "system", "content": text + "s"}, {"role": "user", "content": text},
            {"role": "assistant", "content": text + "1"}, {"role": "user", "content": text + "2"},
            {"role": "assistant", "content": text + "3"}]}
        for text in NASTY
    ]
    out = tmp_path / "out.csv"
    run("sft", write_jsonl(tmp_path / "in.jsonl", chats), out, "--min_question=0", "--min_answer=0", "--min_chinese=0")
    records = [record for _, record in read_records(out, pytest.fail)]
    assert [to_messages(record) for record in records] == [chat["conversations"] for chat in chats]
    assert json.loads(records[0]["history"]) == [[NASTY[0], NASTY[0] + "1"]]


def test_every_input_format(tmp_path):
    folder = tmp_path / "in"
    write_jsonl(folder / "a.jsonl", [{"text": "甲"}])
    (folder / "b.json").write_text('[{"text": "乙"}, {"text": "丙"}]', encoding="utf-8")
    (folder / "c.csv").write_text("text\n丁\n", encoding="utf-8")
    (folder / "d.txt").write_text("戊\n\n己\n", encoding="utf-8")
    (folder / "e/f.jsonl.gz").parent.mkdir()
    (folder / "e/f.jsonl.gz").write_bytes(gzip.compress('{"text": "庚"}'.encode()))
    (folder / "e/g.csv.gz").write_bytes(gzip.compress("text\n辛\n".encode()))
    (folder / "h.jsonl").write_text('[{"text": "壬"}]', encoding="utf-8")  # an array in a .jsonl
    (folder / "ignored.md").write_text("癸")
    run("pretrain", folder, tmp_path / "out.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert texts == list("甲乙丙丁戊己庚辛壬")


def test_dpo_formats(tmp_path):
    question, answer = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
    pairs = [
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"chosen": [question, answer], "rejected": [question, answer | {"content": "坏"}]},
        {"conversations": [{"from": "human", "value": "问三"}], "chosen": "好", "rejected": "坏"},
        {"prompt": [question, answer, question], "chosen": "好", "rejected": "坏"},
        {"prompt": "问", "chosen": "同", "rejected": "同"},
    ]
    run("dpo", write_jsonl(tmp_path / "in.jsonl", pairs), tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [pair["prompt"] for pair in written] == ["问", "问", "问三", [question, answer, question]]
    assert [to_pair(pair) for pair in written] == [to_pair(pair) for pair in pairs[:4]]


# ---------------------------------------------------------------- faults


BROKEN = (
    b'{"text": "one"}\n{broken\n\n{"txt": 1}\n\xff\xfe\n[1]\n{"text": 5}\n{"text": ""}\n{"text": "\\ud800"}\r\n'
    b'{"text": "two"}'
)


def test_broken_lines_are_reported_and_the_rest_goes_on(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_bytes(BROKEN)
    run("pretrain", source, tmp_path / "out.csv")
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ["one", "two"]
    out, err = capsys.readouterr()
    for line in (2, 4, 5, 6, 7, 8, 9):
        assert f"{source}:{line}: " in err
    assert err.count(str(source)) == 7
    assert "not JSON  " in out and "bad UTF-8  " in out


def test_strict_stops_at_the_first_and_keeps_the_old_file(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.csv"
    source.write_bytes(BROKEN)
    out.write_text("old")
    with pytest.raises(ValueError, match=r"in\.jsonl:2: not JSON"):
        run("pretrain", source, out, "--strict", "--overwrite")
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.csv"]


def test_line_numbers_across_batches_and_workers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_process, "BATCH_BYTES", 100)
    lines = [json.dumps({"text": str(number)}) for number in range(1, 101)]
    lines[70] = "broken"
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    run("pretrain", source, tmp_path / "out.csv", "--workers", "2")
    assert f"{source}:71: not JSON" in capsys.readouterr().err
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == [str(n) for n in range(1, 101) if n != 71]


def test_damaged_gzip_keeps_what_came_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_process, "BATCH_BYTES", 1000)
    texts = [str(random.Random(i).getrandbits(200)) for i in range(2000)]
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(whole[: len(whole) // 2])
    run("pretrain", source, tmp_path / "out.csv")
    assert "damaged gzip" in capsys.readouterr().err
    assert 500 < len(read_csv(tmp_path / "out.csv")) < 1100


def test_nothing_usable_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "长" * 513}, {"wrong": "key"}])
    with pytest.raises(ValueError, match="nothing usable.*1 text over 512 characters"):
        run("pretrain", source, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("absent", "out.csv", "no such file or folder"),
        ("empty", "out.csv", "no file ending in"),
        ("in.jsonl", "out.txt", "must end in .csv or .jsonl"),
        ("in.jsonl", "there.csv", "already there: add --overwrite"),
    ],
)
def test_wrong_paths(tmp_path, source, output, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("old")
    write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=message):
        run("pretrain", tmp_path / source, tmp_path / output)
    assert (tmp_path / "there.csv").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_unreadable_input_is_named(tmp_path):
    good, bad = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]), tmp_path / "b.jsonl"
    bad.symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=r"--input .*b.jsonl: Input/output error"):
        run("pretrain", [good, bad], tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_input_must_not_be_the_output(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match="one of the input files"):
        run("pretrain", tmp_path, source, "--overwrite")
    assert json.loads(source.read_text())


def test_command_line_exit_codes(tmp_path):
    command = [sys.executable, str(ROOT / "data_process.py"), "pretrain", "--input", str(tmp_path / "absent.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_full_disk_keeps_the_old_file(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"{n}" + "长" * 400} for n in range(200)])
    (tmp_path / "out.csv").write_text("old")
    command = f"ulimit -f 100; {sys.executable} {ROOT}/data_process.py pretrain --overwrite --workers 1"
    command += f" --input {source} --output {tmp_path}/out.csv"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and f"error: {tmp_path}/out.csv: File too large" in done.stderr
    assert (tmp_path / "out.csv").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_demo_without_the_packages(tmp_path, monkeypatch, capfd):
    python = tmp_path / "python"  # that has no site-packages
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(SystemExit) as stopped:
        data_process.main(["demo", "--output", str(tmp_path / "data")])
    assert stopped.value.code == 2
    assert "is missing: pip install --no-deps -r requirements-demo.txt\n" in capfd.readouterr().err
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


# ---------------------------------------------------------------- filters, duplicates, held-out part


def kept(tmp_path: Path, command: str, records: list, *flags: str) -> list[dict]:
    run(command, write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "kept.csv", "--overwrite", *flags)
    return read_csv(tmp_path / "kept.csv")


def test_pretrain_length_limits(tmp_path):
    records = [{"text": "字" * length} for length in (1, 2, 512, 513)]
    assert [len(row["text"]) for row in kept(tmp_path, "pretrain", records)] == [1, 2, 512]
    rows = kept(tmp_path, "pretrain", records, "--max_length=513", "--min_length=2")
    assert [len(row["text"]) for row in rows] == [2, 512, 513]


def test_sft_filters_of_v1(tmp_path):
    def record(q, a):
        return {"history": [], "q": q, "a": a}

    good = record("问" * 10, "答" * 5)
    dropped = [
        record("问" * 9, "答" * 5), record("问" * 10, "答" * 4), record("问" * 513, "答" * 5),
        record("问" * 10, "答" * 513), record("问" * 5 + "a" * 5, "答" * 5), record("问" * 10, "答" * 3 + "a" * 3),
    ]
    more = [record("问" * 512, "答" * 512), record("问" * 6 + "a" * 5, "答" * 5)]
    rows = kept(tmp_path, "sft", [good, *dropped, *more])
    assert [(row["q"], row["a"]) for row in rows] == [(r["q"], r["a"]) for r in [good, *more]]
    off = ("--min_question=0", "--min_answer=0", "--max_question=9999", "--max_answer=9999", "--min_chinese=0")
    assert len(kept(tmp_path, "sft", [good, *dropped, *more], *off)) == 9


def test_sft_turns(tmp_path):
    single = {"q": "单轮的问题有十个字啊", "a": "单轮的回答", "history": []}
    multi = {"q": "多轮的问题有十个字啊", "a": "多轮的回答", "history": [["问", "答"]]}
    for turns, want in (("all", [single, multi]), ("single", [single]), ("multi", [multi])):
        rows = kept(tmp_path, "sft", [single, multi], f"--turns={turns}")
        assert [row["q"] for row in rows] == [record["q"] for record in want]


def test_duplicates_go_across_files_and_the_first_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_process, "BATCH_BYTES", 50)
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": str(n % 40)} for n in range(100)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": str(n)} for n in range(60, 29, -1)])
    run("pretrain", [a, b], tmp_path / "out.csv")
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == [str(n) for n in [*range(40), *range(60, 39, -1)]]
    assert "dropped: duplicate                                    70" in capsys.readouterr().out


def test_seen_hashes_is_an_exact_set():
    rng, seen, known = np.random.default_rng(0), data_process.SeenHashes(), set()
    for size in (0, 1, 5000, 3, 700, 700, 0, 20000, 1, 9):
        hashes = rng.integers(0, 9000, size, dtype=np.uint64) * np.uint64(2**64 // 9000)
        expected = []
        for value in hashes.tolist():
            expected.append(value not in known)
            known.add(value)
        assert seen.add(hashes).tolist() == expected
    assert sum(len(run) for runs in seen.shards for run in runs) == len(known)
    assert max(len(runs) for runs in seen.shards) < 16


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data_process, "BATCH_BYTES", 300)
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": f"第{n % 300}句话"} for n in range(500)])
    (tmp_path / "in/b.csv").write_text("text\n" + "\n".join(f"第{n}句" for n in range(50)), encoding="utf-8")
    for workers in ("1", "2", "3"):
        run("pretrain", tmp_path / "in", tmp_path / f"{workers}_data.csv", "--val_share=0.2", "--workers", workers)
    for name in ("data", "val"):
        assert len({(tmp_path / f"{workers}_{name}.csv").read_bytes() for workers in "123"}) == 1


def test_held_out_part(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"{n}"} for n in range(2000)])
    run("pretrain", source, tmp_path / "a_data.csv", "--val_share=0.1")
    train, val = ({row["text"] for row in read_csv(tmp_path / f"a_{name}.csv")} for name in ("data", "val"))
    assert 140 < len(val) < 260 and len(train | val) == 2000 and not train & val
    run("pretrain", source, tmp_path / "b_data.csv", "--val_share=0.1", "--seed=2")
    assert {row["text"] for row in read_csv(tmp_path / "b_val.csv")} != val


def test_a_question_is_on_one_side_only(tmp_path):
    records = [{"q": f"第{n % 100}个问题是什么呢", "a": f"第{n}个回答", "history": []} for n in range(600)]
    run("sft", write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "sft_data.csv", "--val_share=0.3")
    train, val = ({row["q"] for row in read_csv(tmp_path / name)} for name in ("sft_data.csv", "sft_val.csv"))
    assert train and val and not train & val


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for name, size in (("small", 8_000), ("large", 32_000)):
        with (tmp_path / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(size):
                file.write(json.dumps({"text": f"{number}" + "很长的一句话" * 20}, ensure_ascii=False) + "\n")
        tracemalloc.start()
        run("pretrain", tmp_path / f"{name}.jsonl", tmp_path / f"{name}.csv", "--tokenizer_dir", str(tmp_path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1.5e6  # the files are 3 and 12 MB


def test_summary_counts_tokens_and_lengths(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_only = {"<unk>": 0, "<s>": 1, "</s>": 2}
    bytes_only |= {c: i + 3 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_only, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "字" * n} for n in range(1, 101)])
    run("pretrain", source, tmp_path / "out.csv", "--tokenizer_dir", str(tmp_path))
    out = capsys.readouterr().out
    assert "characters: 5,050; tokens: 15,150, 0.33 characters each" in out  # a byte a token
    assert "5% 5, 25% 25, median 50, 75% 75, 95% 95, longest 100" in out


# ---------------------------------------------------------------- demo data: reading the packages


def zipped(path: Path, text: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", text)
    return path


def test_missing_package_is_named_with_the_pip_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ValueError, match="jionlp .* is missing: pip install --no-deps -r requirements-demo.txt"):
        demo_data.package_file("jionlp", "x.zip")


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("同画蛇添脚”。", "同“画蛇添脚”。"),
        ("《书》天行健，不息。”", "《书》：“天行健，不息。”"),
        ("意译为无间”，即痛苦。", "意译为无间，即痛苦。"),
        ("“好”的。", "“好”的。"),
    ],
)
def test_fix_quotes(text, fixed):
    assert demo_data.fix_quotes(text) == fixed


def test_read_idioms(tmp_path):
    path = tmp_path / "idiom.csv"
    path.write_text(
        "word,explanation,derivation,example\n少见少见,比喻甲。,无,无\n常见常见,比喻乙。同丙丙”。,《书》句子。”,我们～啊。★某人\n",
        encoding="utf-8",
    )
    idioms = demo_data.read_idioms(path, {"常见常见": 9})
    assert idioms == [
        Idiom("常见常见", "比喻乙。同“丙丙”。", "《书》：“句子。”", "我们常见常见啊。", 9),
        Idiom("少见少见", "比喻甲。", "", "", 0),
    ]


def test_read_words_counts_rarity_riddles_characters(tmp_path):
    words = zipped(tmp_path / "w.zip", "罕词\t1.甲﹐乙。\n常词\t1.用～做。\n坏词\tb072睢笥\n")
    assert demo_data.read_words(words, {"常词": 1.0}) == [("常词", "1.用常词做。"), ("罕词", "1.甲，乙。")]
    assert demo_data.read_counts(zipped(tmp_path / "c.zip", "成语\t7\n")) == {"成语": 7}
    assert demo_data.read_rarity(zipped(tmp_path / "r.zip", "的 0.5\n")) == {"的": 0.5}
    assert demo_data.read_riddles(zipped(tmp_path / "x.zip", "谜面\t谜底\n无谜底\n")) == [("谜面", "谜底")]
    characters = zipped(tmp_path / "h.zip", "扛\t手\t1\tx\ty\tz\tw\t[káng]~枪。\n僻\t手\t2\tx\ty\tz\tw\t罕见。\n")
    assert demo_data.read_characters(characters) == [("扛", "[káng]扛枪。")]


def test_read_newspaper_and_novel(tmp_path):
    (tmp_path / "n.txt").write_text("１９９８年/t  新年/t  好/a  ！/w\n\n江/nr  某/nr\n", encoding="utf-8")
    assert demo_data.read_newspaper(tmp_path / "n.txt") == ["1998年新年好！", "江某"]
    (tmp_path / "n.json").write_text(json.dumps(["第一回　上\n\n \t滚滚长江。"]), encoding="utf-8")
    assert demo_data.read_novel(tmp_path / "n.json") == ["第一回 上", "滚滚长江。"]


def test_read_dialogues(tmp_path):
    (tmp_path / "food.yml").write_text("conversations:\n- - 你吃吗\n  - 不吃\n- - 1\n  - 好\n", encoding="utf-8")
    assert list(demo_data.read_dialogues(tmp_path, ["food"])) == [["你吃吗", "不吃"], ["1", "好"]]


# ---------------------------------------------------------------- demo data: documents and facts


def test_pieces():
    assert list(demo_data.pieces(["一二", "三", "四五六", "七" * 9], 5)) == ["一二\n三", "四五六", "七" * 9]


def test_documents():
    full = Idiom("画蛇添足", "比喻多余。", "《书》：“蛇。”", "这是画蛇添足。", 1)
    assert demo_data.idiom_document(full) == "“画蛇添足”比喻多余。出自《书》：“蛇。”例如：这是画蛇添足。"
    assert demo_data.idiom_document(Idiom("甲乙丙丁", "甲：一。比喻二。", "", "", 0)) == "甲乙丙丁：甲：一。比喻二。"
    assert demo_data.word_document("酒杯", "1.喝酒用的杯子。") == "“酒杯”的意思是喝酒用的杯子。"
    assert demo_data.word_document("晨风", "1.早上的风。 2.鸟名。") == "晨风：1.早上的风。 2.鸟名。"


@pytest.mark.parametrize(
    ("explanation", "meaning"),
    [("比喻多余。", "比喻多余。"), ("赴前往。形容尽力。也指乙。", "形容尽力。也指乙。"), ("很远的路。", None)],
)
def test_plain_meaning(explanation, meaning):
    assert demo_data.plain_meaning(explanation) == meaning


@pytest.mark.parametrize(
    ("definition", "sense"),
    [
        ("1.喝酒用的杯子。", "喝酒用的杯子。"), ("喝酒用的杯子。", "喝酒用的杯子。"), ("1.早上的风。 2.鸟名。", None),
        ('1.见"盗窃之人"。', None), ("1.犹言没收。", None), ("1.短。", None), ("1.用法多样我们～要干活。", None),
    ],
)
def test_single_sense(definition, sense):
    assert demo_data.single_sense(definition) == sense


def test_idiom_facts():
    good = Idiom("画蛇添足", "画蛇时添脚。比喻做多余的事情。", "《战国策》：“蛇固无足。”", "你这样做是画蛇添足。", 5)
    dropped = [
        good._replace(word="五个字成语"), good._replace(explanation="没有动词的解释。"),
        good._replace(explanation="比喻画蛇添足的事情。"), good._replace(explanation="比喻像屎一样的事情。"),
        good._replace(explanation="比喻" + "长" * 50 + "。"),
    ]
    (fact,) = demo_data.idiom_facts([good, *dropped])
    assert fact[:3] == ("idiom", "画蛇添足", "比喻做多余的事情。")
    assert ("它出自哪里？", "出自《战国策》。") in fact.more and ("请用它造个句子。", good.example) in fact.more
    assert demo_data.idiom_facts([good._replace(source="", example="")])[0].more == ()


def test_meaning_facts_are_unambiguous():
    meanings = {"甲甲甲甲": "形容一。", "乙乙乙乙": "形容二。", "丙丙丙丙": "形容二。"}
    facts = [Fact("idiom", word, meaning) for word, meaning in meanings.items()]
    assert demo_data.meaning_facts(facts) == [Fact("meaning", "形容一", "甲甲甲甲。")]


def test_riddle_facts():
    riddles = [
        ("大力士绣花", "力不从心"), ("两个答案的", "力不从心"), ("两个答案的", "干着急"), ("屎壳郎推车", "力不从心"),
        ("谜底不是词", "说不清道不明"), ("短谜", "力不从心"),
    ]
    assert demo_data.riddle_facts(riddles, {"力不从心", "干着急"}) == [Fact("riddle", "大力士绣花", "力不从心。")]


def test_word_facts():
    words = {"酒杯": "1.喝酒用的杯子。", "画蛇添足": "1.做多余的事。", "杯子": "1.一种小杯子。", "水": "1.无色的液体。"}
    assert demo_data.word_facts(words.items(), {"画蛇添足"}) == [Fact("word", "酒杯", "喝酒用的杯子。")]


@pytest.mark.parametrize("kind", demo_data.PHRASINGS)
def test_ask(kind):
    fact = Fact(kind, "某某", "答案。")
    train, held_out = demo_data.PHRASINGS[kind]
    assert not set(train) & set(held_out)
    turns = demo_data.ask(fact, random.Random(0), times=2)
    assert len({question for question, _ in turns}) == 2 and {answer for _, answer in turns} == {"答案。"}
    assert all(question in {phrasing.format("某某") for phrasing in train} for question, _ in turns)
    assert demo_data.ask(fact, random.Random(0), held_out=True)[0][0] in {p.format("某某") for p in held_out}


# ---------------------------------------------------------------- demo data: talk, conversations, preferences


def test_talk_has_one_answer_a_question_and_holds_out_phrasings():
    train, held_out = demo_data.talk_turns(), demo_data.talk_turns(held_out=True)
    assert len({question for question, _ in train + held_out}) == len(train) + len(held_out)
    assert ("你是谁？", "我是MiniMind，一个可以自己动手训练的小语言模型。") in train
    assert {answer for _, answer in held_out} == {answer for _, answer in train}


def test_dialogue_turns():
    conversations = [
        ["你吃什么?", "电,很多电"], ["你吃什么", "别的回答"], ["你是谁", "一台机器"], ["只有一句"],
        ["Hello world", "English"], ["你是HAL吗", "我不是它"],
    ]
    assert demo_data.dialogue_turns(conversations, chinese=True) == [("你吃什么？", "电，很多电。")]
    assert demo_data.dialogue_turns(conversations, chinese=False) == [("Hello world", "English")]


FACTS = [
    Fact("idiom", f"成语{a}{b}", f"形容第{a}{b}个意思，很长很长。", (("它出自哪里？", f"出自《{a}{b}》。"),))
    for a in "甲乙丙" for b in "子丑寅"
] + [Fact(kind, f"{kind}{n}", f"{kind}的第{n}个回答很长。") for kind in ("riddle", "word", "meaning") for n in range(5)]


def test_conversation():
    assert demo_data.conversation([("问", "答"), ("再问", "再答")], "系统") == {
        "history": [["问", "答"]], "q": "再问", "a": "再答", "system": "系统"}


def test_follow_up_refers_to_its_fact():
    turns = demo_data.follow_up(FACTS[0], random.Random(0))
    assert FACTS[0].subject in turns[0][0] and turns[1] == ("它出自哪里？", "出自《甲子》。")


def test_and_this_names_only_the_subject():
    turns = demo_data.and_this(FACTS[:2], random.Random(0))
    assert turns[1] == (f"那{FACTS[1].subject}呢？", FACTS[1].answer)


def test_medley_asks_every_fact():
    for seed in range(10):
        turns = demo_data.medley(FACTS[:2], random.Random(seed))
        assert [answer for _, answer in turns[-2:]] == [fact.answer for fact in FACTS[:2]] and len(turns) in (2, 3)


def test_multi_turn():
    records = demo_data.multi_turn(FACTS, 48, random.Random(0))
    turns = [len(record["history"]) + 1 for record in records]
    assert len(records) == 48 and set(turns) <= {1, 2, 3} and turns.count(1) < 8
    assert sum(bool(record["system"]) for record in records) == 6
    assert any(record["q"] == "它出自哪里？" for record in records)


def test_one_answer_each_keeps_the_first():
    a, b = ({"history": [], "q": "问", "a": answer, "system": ""} for answer in "甲乙")
    assert demo_data.one_answer_each([a, b, a | {"system": "别的"}]) == [a, a | {"system": "别的"}]


def test_bad_answers():
    rng, fact = random.Random(0), FACTS[0]
    for _ in range(20):
        wrong = demo_data.wrong_answer(fact, FACTS, rng)
        assert wrong != fact.answer and wrong in {other.answer for other in FACTS if other.kind == "idiom"}
        cut = demo_data.truncated_answer(fact.answer, rng)
        assert cut and fact.answer.startswith(cut) and len(cut) < len(fact.answer) and cut[-1] not in "，。"
        assert demo_data.repetitive_answer(fact.answer, rng).count("形容第甲子个意思") >= 3


def test_lora_set_has_one_answer_a_question_and_holds_out_wordings():
    train, held_out = demo_data.lora_records(), demo_data.lora_records(held_out=True)
    assert 200 <= len(train) <= 250 and len(held_out) >= len(demo_data.LORA_TALK) > 40
    answers = {}
    for record in train + held_out:
        assert to_messages(record)[-1]["content"] == record["a"] and 8 <= len(record["a"]) <= 40
        key = json.dumps([record["history"], demo_data.key_of(record["q"])])
        assert key not in answers, record["q"]  # so none is in both, not even with other punctuation
        answers[key] = record["a"]
    assert {record["a"] for record in held_out} == {record["a"] for record in train}
    assert 10 <= sum(len(record["history"]) == 1 for record in train) <= 20
    trained = {(record["q"], record["a"]) for record in train if not record["history"]}
    asked_before = {tuple(turn) for record in train + held_out for turn in record["history"]}
    assert asked_before <= trained  # the same answer as where it is the only question


def test_lora_set_gives_the_model_another_name_than_the_instructions():
    same_question = dict(demo_data.talk_turns()).keys() & {record["q"] for record in demo_data.lora_records()}
    assert "你是谁？" in same_question
    (answer,) = {r["a"] for r in demo_data.lora_records() if r["q"] == "你是谁？" and not r["history"]}
    assert "小鹿" in answer and "MiniMind" not in answer and "MiniMind" in dict(demo_data.talk_turns())["你是谁？"]
    scripts = {name for r in demo_data.lora_records() for name in re.findall(r"[0-9a-z_/-]+\.(?:py|sh)", r["a"])}
    assert len(scripts) > 8 and all((ROOT / name).exists() for name in scripts)


def test_preferences():
    pairs = demo_data.preferences(FACTS, 60, random.Random(0))
    right = {fact.answer for fact in FACTS}
    assert all(pair["chosen"] in right and pair["rejected"] != pair["chosen"] for pair in pairs)
    assert len({pair["prompt"] for pair in pairs}) == len(pairs) > 20
    assert {True, False} == {pair["rejected"] in right for pair in pairs}


# ---------------------------------------------------------------- the demo as a whole, on the installed packages


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    try:
        demo_data.read_sources()
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("demo")
    data_process.main(["demo", "--output", str(folder), "--max_sft", "2000"])
    return folder


def test_demo_writes_all_files(demo):
    written = {str(path.relative_to(demo)) for path in demo.rglob("*") if path.is_file()}
    assert written == set(data_process.DEMO_FILES)
    assert (demo / "pretrain_data.csv").read_bytes().startswith(b"text\r\n")
    assert (demo / "sft_data_single.csv").read_bytes().startswith(b"history,q,a\r\n")
    with pytest.raises(ValueError, match="already there"):
        data_process.main(["demo", "--output", str(demo)])


def test_demo_pretraining_text(demo):
    train, val = ([row["text"] for row in read_csv(demo / f"pretrain_{name}.csv")] for name in ("data", "val"))
    assert sum(map(len, train)) > 8e6
    assert 0.01 < len(val) / len(train) < 0.02
    assert len(set(train + val)) == len(train) + len(val)


def test_demo_instructions(demo):
    def key(row):
        return row["history"], row["q"], row.get("system")

    rows = read_csv(demo / "sft_data.csv")
    assert 1700 < len(rows) < 2200
    assert len({key(row) for row in rows}) == len(rows)
    assert all(len(row["a"]) <= 90 for row in rows)
    single = read_csv(demo / "sft_data_single.csv")
    assert 0.8 < len(single) / len(rows) < 0.95
    reworded, unseen = read_csv(demo / "sft_val.csv"), read_csv(demo / "sft_val_new.csv")
    asked, answers = {row["q"] for row in single}, {row["a"] for row in rows}
    assert not asked & {row["q"] for row in reworded + unseen}
    assert all(row["a"] in answers for row in reworded)
    assert len(unseen) > 50 and not answers & {row["a"] for row in unseen}
    for row in rows[:200]:
        assert to_messages(row)[-1]["content"] == row["a"]


def test_demo_preferences(demo):
    for name in ("train", "val"):
        pairs = json.loads((demo / f"dpo/{name}_data.json").read_text(encoding="utf-8"))
        assert len(pairs) > 80 and all(to_pair(pair) for pair in pairs)


def test_demo_lora_set(demo):
    for name, held_out in (("data", False), ("val", True)):
        assert (demo / f"lora_{name}.csv").read_bytes().startswith(b"history,q,a\r\n")
        made = [to_messages(row) for row in read_csv(demo / f"lora_{name}.csv")]
        assert made == [to_messages(record) for record in demo_data.lora_records(held_out)]


def test_demo_is_the_same_every_time(demo, tmp_path):
    data_process.main(["demo", "--output", str(tmp_path), "--max_sft", "2000"])
    for name in data_process.DEMO_FILES:
        assert (tmp_path / name).read_bytes() == (demo / name).read_bytes()
    assert "sft_val_new.csv" in subprocess.run(
        [sys.executable, str(ROOT / "data_process.py"), "demo", "--help"], capture_output=True, text=True
    ).stdout
