"""Reading data files, the token cache, packing, and the order of the rows."""

import ast
import csv
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from model import dataset
from model.dataset import IGNORE, PretrainData, SFTData, pack, read_records, to_messages, to_pair, to_text
from model.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parents[1]
BOS, EOS = 1, 2
same_folder = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_tokenizer(merges=()) -> Tokenizer:
    """A tokenizer whose token of byte b is b + 3, so that ids can be written by hand."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    alphabet = {chr(b if b in own else next(others)): b + 3 for b in range(256)}
    vocab = alphabet | {"".join(pair): 259 + i for i, pair in enumerate(merges)}
    backend = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2} | vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend.to_str())


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def ids(text: str) -> list[int]:
    """The ids of a text where {s} and {e} stand for <s> and </s>."""
    special = {0xFE: BOS, 0xFF: EOS}  # bytes that UTF-8 never has
    raw = text.encode().replace(b"{s}", b"\xfe").replace(b"{e}", b"\xff")
    return [special.get(b, b + 3) for b in raw]


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_csv(path: Path, header: list[str], rows) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read(path: Path) -> tuple[list, list]:
    """([(line, record)], [(line, kind of fault)]) of a file."""
    faults = []
    records = list(read_records(path, lambda p, line, reason: faults.append((line, reason.split(":")[0]))))
    return records, faults


def caches(path: Path) -> list[Path]:
    return sorted(p for p in path.parent.iterdir() if p.name.startswith(path.name + ".cache"))


# ------------------------------------------------------------------------------------------------- reading

TEXTS = ["一，二", 'say "hi"\\n', "two\nlines", "NA", "null", "👍 emoji", " spaces "]


def as_bytes(suffix: str) -> bytes:
    records = [{"text": text} for text in TEXTS]
    if suffix == ".jsonl":
        return "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    if suffix == ".json":
        return json.dumps(records, indent=1).encode()
    if suffix == ".txt":
        return "\r\n".join(t for t in TEXTS if "\n" not in t).encode()
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["text"], *([text] for text in TEXTS)])
    return out.getvalue().encode()


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, suffix, packed, bom):
    path = tmp_path / f"data{suffix}{'.gz' if packed else ''}"
    content = bom + as_bytes(suffix)
    path.write_bytes(gzip.compress(content) if packed else content)
    records, faults = read(path)
    assert [to_text(r) for _, r in records] == [t for t in TEXTS if suffix != ".txt" or "\n" not in t]
    assert faults == []


def test_line_numbers_are_those_of_an_editor(tmp_path):
    assert [n for n, _ in read(write_csv(tmp_path / "a.csv", ["text"], [["a\nb"], ["c"], ["d"]]))[0]] == [2, 4, 5]
    (tmp_path / "a.json").write_text('[\n{"text":\n"a"},\n\n{"text": "b"}, {"text": "c"}]')
    assert [n for n, _ in read(tmp_path / "a.json")[0]] == [2, 5, 5]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}')
    assert [n for n, _ in read(tmp_path / "a.jsonl")[0]] == [1, 3]


def test_progress_is_told_in_bytes_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100}] * 100)
    seen = []
    list(read_records(path, pytest.fail, seen.append))
    assert seen == sorted(seen) and len(seen) > 10 and seen[-1] == path.stat().st_size


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tricky = st.sampled_from(["", "NA", "null", "nan", "\\", '\\"', '"', "\r", "\n", "\r\n", ",", "\ufeff", "\u2028", "🤖"])


@same_folder
@given(rows=st.lists(st.lists(cells | tricky, min_size=3, max_size=3), max_size=8))
def test_any_text_survives_the_csv(tmp_path, rows):
    records, faults = read(write_csv(tmp_path / "a.csv", ["history", "q", "a"], rows))
    assert [list(record.values()) for _, record in records] == rows and faults == []


def test_a_cell_may_be_longer_than_the_csv_module_allows_by_default(tmp_path):
    text = "长" * 200_000
    assert read(write_csv(tmp_path / "a.csv", ["text"], [[text]]))[0] == [(2, {"text": text})]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@same_folder
@given(
    records=st.lists(st.dictionaries(st.sampled_from(["text", 'a"]},{', "\\"]), json_values), max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
    block=st.integers(1, 40),
)
def test_a_json_array_is_read_like_json_load_whatever_the_blocks(tmp_path, records, indent, ascii, block):
    (tmp_path / "a.json").write_text(json.dumps(records, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "BLOCK_BYTES", block)
        found, faults = read(tmp_path / "a.json")
    # Where a block holds nothing but "[", the file is still taken for an array.
    assert [record for _, record in found] == records and faults == []


def test_broken_lines_are_reported_and_the_rest_is_read(tmp_path):
    good = b'{"text": "good"}\n'
    bad = [
        b'{"text": "cut\n',
        b"[1, 2]\n",
        b'{"text": "\xff\xfe"}\n',
        b"[" * 50_000 + b"\n",
        b"7" * 5000 + b"\n",
        b"{}}\n",
    ]
    (tmp_path / "a.jsonl").write_bytes(good + good.join(bad) + good)
    records, faults = read(tmp_path / "a.jsonl")
    assert [n for n, _ in records] == [1, 3, 5, 7, 9, 11, 13]
    kinds = ["not JSON", "not an object", "bad UTF-8", "not JSON", "not JSON", "not JSON"]
    assert faults == list(zip([2, 4, 6, 8, 10, 12], kinds, strict=True))


def test_broken_csv_rows_are_reported_and_the_rest_is_read(tmp_path):
    rows = b'q,a\n1,2\n1\n1,2,3\n"x\n\xe4\xb8",2\n3,4\na\rb,5\n5,6\n"say "hi"",7\n7,8\n"open,9\n8,9\n'
    (tmp_path / "a.csv").write_bytes(rows)
    records, faults = read(tmp_path / "a.csv")
    assert [(n, r["q"]) for n, r in records] == [(2, "1"), (7, "3"), (9, "5"), (11, "7")]
    wrong = "wrong number of cells"
    assert faults == [(3, wrong), (4, wrong), (5, "bad UTF-8"), (8, "bad CSV"), (10, "bad CSV"), (12, "bad CSV")]


@pytest.mark.parametrize("block", [1 << 20, 50])
def test_broken_elements_of_a_json_array_are_reported_and_the_rest_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(dataset, "BLOCK_BYTES", block)
    parts = [b'{"text": "a"}', b'{"text": oops}', b'{"text": "b"}', b'{"text": "\xff"}', b"3", b'{"text": "c"}']
    parts += [b'{"text": ' + b"[" * 5000 + b"}", b'{"text": "d"}', b'{"text": "cut']
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join(parts))
    records, faults = read(tmp_path / "a.json")
    assert [(n, r["text"]) for n, r in records] == [(1, "a"), (3, "b"), (6, "c"), (8, "d")]
    assert faults == [(2, "not JSON"), (4, "bad UTF-8"), (5, "not an object"), (7, "not JSON"), (9, "not JSON")]


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 64)
    monkeypatch.setattr(dataset, "MAX_RECORD_BYTES", 200)
    (tmp_path / "a.txt").write_text("a\n" + "x" * 5000 + "\nb\n" + "y" * 150 + "\n")
    records, faults = read(tmp_path / "a.txt")
    assert [r["text"][0] for _, r in records] == ["a", "b", "y"] and faults == [(2, "too long")]
    write_csv(tmp_path / "a.csv", ["text"], [["a"], ["z\n" * 2000 + "z"], ["b"]])
    records, faults = read(tmp_path / "a.csv")
    assert {r["text"] for _, r in records} >= {"a", "b"} and faults[0] == (3, "bad CSV")
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "' + "x" * 5000 + '"}, {"text": "b"}]')
    records, faults = read(tmp_path / "a.json")
    assert [r["text"] for _, r in records] == ["a", "b"] and faults == [(1, "not JSON")]


def test_a_cut_gzip_file_is_reported(tmp_path):
    content = "".join(f"line {i} {hashlib.md5(str(i).encode()).hexdigest()}\n" for i in range(20_000)).encode()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content)[:300_000])
    records, faults = read(tmp_path / "a.txt.gz")
    assert len(records) > 5000 and ("damaged gzip" in {kind for _, kind in faults})


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.parquet: its name must end in \.jsonl"):
        read_records(tmp_path / "corpus.parquet", pytest.fail)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.csv", pytest.fail)


# ------------------------------------------------------------------------------------------------- records


def chat(*texts: str, system: str | None = None) -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def shares(*pairs: tuple[str, str]) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in pairs]}


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"conversations": chat("q", "a")}, chat("q", "a")),
        ({"messages": chat("q", "a", system="s")}, chat("q", "a", system="s")),
        (shares(("human", "q"), ("gpt", "a")), chat("q", "a")),
        (shares(("system", "s"), ("user", "q"), ("assistant", "a"), ("human", "r")), chat("q", "a", system="s")),
        (shares(("human", "q"), ("gpt", "a")) | {"system": "s"}, chat("q", "a", system="s")),
        ({"q": "q", "a": "a"}, chat("q", "a")),
        ({"history": "", "q": "q", "a": "a"}, chat("q", "a")),
        ({"history": "[]", "q": "q", "a": "a"}, chat("q", "a")),
        ({"history": '[["1", "二\\n\\u4e09"]]', "q": "q", "a": "a"}, chat("1", "二\n三", "q", "a")),
        ({"history": "[['it\\'s', \"b'\"], ('[(', '\\\\n\\n')]", "q": "q", "a": "a"},
         chat("it's", "b'", "[(", "\\n\n", "q", "a")),
        ({"history": repr([['"x"', "l1\nl2\\"]]), "q": "q", "a": "a"}, chat('"x"', "l1\nl2\\", "q", "a")),
        ({"instruction": "do", "input": "", "output": "a"}, chat("do", "a")),
        ({"instruction": "do", "input": "this", "output": "a"}, chat("do\nthis", "a")),
        ({"instruction": "", "input": "q", "output": "a"}, chat("q", "a")),
        ({"instruction": "q", "output": "a", "history": [["1", "2"]]}, chat("1", "2", "q", "a")),
        ({"instruction": "q", "output": "a", "system": "s"}, chat("q", "a", system="s")),
        ({"instruction": "q", "input": None, "output": " a\n", "history": None}, chat("q", " a\n")),
    ],
)  # fmt: skip
def test_conversations_in_every_format(record, messages):
    assert to_messages(record) == messages


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"text": "x"}, "no conversation: the keys are"),
        ({"q": "q"}, "no key 'a'"),
        ({"q": "", "a": "a"}, "empty user turn"),
        ({"q": "q", "a": "  "}, "empty assistant turn"),
        ({"q": "q", "a": None}, "assistant turn is not a string: None"),
        ({"q": "q", "a": "\ud83d"}, "half a surrogate pair"),
        ({"q": "q", "a": "a", "history": [["only one"]]}, "bad history"),
        ({"q": "q", "a": "a", "history": '{"a": 1}'}, "bad history"),
        ({"q": "q", "a": "a", "history": [["1", 2]]}, "assistant turn is not a string: 2"),
        ({"instruction": "", "input": "", "output": "a"}, "empty user turn"),
        ({"conversations": []}, "bad conversations"),
        ({"conversations": ["q", "a"]}, "bad conversations"),
        ({"conversations": chat("q")}, "no answer|wrong turn order"),
        ({"conversations": chat("q", "a")[::-1]}, "wrong turn order"),
        ({"conversations": chat("q", "a") + chat("r", "b", system="late")}, "wrong turn order"),
        (shares(("human", "q"), ("function_call", "{}"), ("gpt", "a")), "unknown role: 'function_call'"),
        ({"conversations": [{"role": ["user"], "content": "q"}]}, "unknown role"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(record, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(record)


@pytest.mark.parametrize(
    "record", [{"content": "x"}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": "\udc80"}]
)
def test_what_is_no_text_is_refused(record):
    with pytest.raises(ValueError):
        to_text(record)


@pytest.mark.parametrize(
    "history",
    [
        "__import__('os').system('touch hacked')",
        "[['a', open('hacked', 'w')]]",
        "[['a', f'{open(\"hacked\", \"w\")}']]",
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        "(" * 90 + "'a'" + ")" * 90,
        "-" * 500_000 + "1",
        "~" * 500_000,
        "1+" * 200_000 + "1",
        "'a'" * 200_000,
        "[['a','b']," * 50_000,
        "{" * 5000,
        "not " * 100_000 + "1",
        "9" * 100_000,
        "'" + "\\" * 99_999,
        '[["a", "b"]]' * 200_000,
        "[['a', '\\N{no such name}']]",
        "[['a', 'b\0']]",
        json.dumps([["q", "a" * 2_000_000]]),
    ],
    ids=lambda history: history[:20],
)
def test_a_hostile_history_is_an_error_and_nothing_else(history, tmp_path, monkeypatch):
    def parse(text):
        assert text[0] in "[('", "only lists of strings may get to the parser: deep nesting of others can crash it"
        return literal_eval(text)

    literal_eval = ast.literal_eval
    monkeypatch.setattr(ast, "literal_eval", parse)
    monkeypatch.chdir(tmp_path)
    try:
        to_messages({"history": history, "q": "q", "a": "a"})
    except ValueError as error:
        assert "history" in str(error) and len(str(error)) < 400
    else:
        assert history == "[['a', 'b\0']]"  # odd, but a list of strings
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": chat("q"), "chosen": chat("x", "good")[1:], "rejected": chat("x", "bad")[1:]},
        {"chosen": chat("q", "good"), "rejected": chat("q", "bad")},
        {"conversations": chat("q"), "chosen": chat("", "good")[1], "rejected": chat("", "bad")[1]},
        shares(("human", "q"))
        | {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
    ],
)
def test_preference_pairs_in_every_format(record):
    assert to_pair(record) == {"prompt": chat("q"), "chosen": "good", "rejected": "bad"}


def test_preference_pairs_keep_the_turns_before():
    before = chat("1", "2", "q", system="s")
    record = {"chosen": before + chat("", "good")[1:], "rejected": before + chat("", "bad")[1:]}
    assert to_pair(record) == {"prompt": before, "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"prompt": "q", "chosen": "a"}, "no key 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "no preference"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty"),
        ({"chosen": "a", "rejected": "b"}, "wrong turn order"),
        ({"chosen": chat("q", "a"), "rejected": chat("other", "b")}, "two prompts"),
        ({"chosen": chat("q"), "rejected": chat("q", "b")}, "no answer"),
        ({"prompt": chat("q", "a"), "chosen": "a", "rejected": "b"}, "wrong turn order"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "bad chosen"),
    ],
)
def test_what_is_wrong_with_a_pair_is_said(record, reason):
    with pytest.raises(ValueError, match=reason):
        to_pair(record)


def test_real_files_are_read_whole(shared_data):
    records, faults = read(shared_data / "sft/alpaca_zh.json")
    assert [record for _, record in records] == json.loads((shared_data / "sft/alpaca_zh.json").read_text("utf-8"))
    assert faults == [] and to_messages(records[0][1])[0]["content"].startswith(
        "描述在这个职位上会成功的人的类型。\n这是一个"
    )
    pairs = [to_pair(record) for _, record in read(shared_data / "dpo/dpo_zh.json")[0]]
    assert len(pairs) == 300 and {pair["prompt"][0]["role"] for pair in pairs} == {"system", "user"}


# --------------------------------------------------------------------------------------------- pretraining


def some_texts(n: int, longest: int = 60, seed: int = 0) -> list[str]:
    """n different texts."""
    random = np.random.default_rng(seed)
    return [f"{i}:" + "x" * int(random.integers(1, longest)) for i in range(n)]


def pretrain(tmp_path, tokenizer, texts, max_seq_len, **options) -> PretrainData:
    return PretrainData(
        write_csv(tmp_path / "p.csv", ["text"], [[t] for t in texts]), tokenizer, max_seq_len, **options
    )


def test_rows_of_pretraining_written_by_hand(tmp_path, tokenizer):
    data = pretrain(tmp_path, tokenizer, ["abcdefg"], 4)
    batch = data.rows(0, 0, 3)
    assert batch.input_ids.tolist() == [ids("{s}abc"), ids("defg"), [0] * 4]
    assert batch.labels.tolist() == [ids("abcd"), ids("efg{e}"), [IGNORE] * 4]
    assert batch.documents is None and batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert (data.num_rows, data.num_tokens, data.num_bytes, batch.num_targets) == (2, 8, 7, 8)


def test_rows_of_isolated_documents_written_by_hand(tmp_path, tokenizer):
    data = pretrain(tmp_path, tokenizer, ["ab", "ab", "ab"], 5, isolate=True)
    batch = data.rows(3, 0, 3)
    assert batch.input_ids.tolist() == [ids("{s}ab{e}{s}"), ids("ab{e}{s}a"), ids("b") + [0] * 4]
    no = [IGNORE]
    assert batch.labels.tolist() == [ids("ab{e}") + no + ids("a"), ids("b{e}") + no + ids("ab"), ids("{e}") + no * 4]
    assert batch.documents.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert batch.documents.dtype == torch.int32
    assert (data.num_rows, data.num_tokens) == (3, 9)


def documents_of(data: PretrainData, epoch: int) -> list[tuple]:
    """The documents of an epoch as the rows hold them: every trained label, cut behind each </s>."""
    labels = data.rows(epoch, 0, data.num_rows).labels.flatten().tolist()
    documents, current = [], []
    for label in labels:
        if label != IGNORE:
            current.append(label)
        if label == EOS:
            documents.append(tuple(current))
            current = []
    assert not current
    return documents


@pytest.mark.parametrize("isolate", [False, True])
def test_every_token_is_trained_exactly_once_an_epoch_in_another_order(tmp_path, tokenizer, isolate):
    texts = some_texts(200) + ["long" * 300]
    data = pretrain(tmp_path, tokenizer, texts, 32, isolate=isolate)
    expected = Counter(tuple(ids(text + "{e}")) for text in texts)
    epochs = [documents_of(data, epoch) for epoch in range(3)]
    assert all(Counter(documents) == expected for documents in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert data.num_tokens == sum(len(t) + 1 for t in texts) and data.num_bytes == sum(len(t) for t in texts)
    assert data.stats["fill"] >= 0.98
    other = pretrain(tmp_path, tokenizer, texts, 32, seed=7)
    assert documents_of(other, 0) != epochs[0]


def test_a_label_is_the_token_after_its_input(tmp_path, tokenizer):
    data = pretrain(tmp_path, tokenizer, some_texts(50), 16)
    batch = data.rows(0, 0, data.num_rows)
    after = torch.cat([batch.input_ids.flatten()[1:], torch.tensor([0])])
    labels = batch.labels.flatten()
    trained = labels != IGNORE
    end = data.num_tokens + 50 - 2  # the last token of the stream is a label and no input
    assert labels[end] == EOS and not trained[end + 1 :].any() and not after[end:].any()
    assert torch.equal(labels[:end][trained[:end]], after[:end][trained[:end]])
    assert (after[:end][~trained[:end]] == BOS).all()


def test_documents_change_where_a_document_begins(tmp_path, tokenizer):
    data = pretrain(tmp_path, tokenizer, some_texts(50), 16, isolate=True)
    batch = data.rows(0, 0, data.num_rows)
    for row, numbers in zip(batch.input_ids.tolist(), batch.documents.tolist(), strict=True):
        number = 0
        for i, (token, found) in enumerate(zip(row, numbers, strict=True)):
            number += token == BOS or i == 0
            assert found == (number if token else 0)


def build(kind, tmp_path, tokenizer):
    if kind == "sft":
        return sft(tmp_path, tokenizer, [chat(text, text[::-1]) for text in some_texts(100, 20)], 80)
    return pretrain(tmp_path, tokenizer, some_texts(100), 32, isolate=kind == "isolated")


@pytest.mark.parametrize("kind", ["pretrain", "isolated", "sft"])
def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path, tokenizer, kind):
    whole = build(kind, tmp_path, tokenizer)
    n = whole.num_rows + 5  # past the end: padding
    expected = {epoch: whole.rows(epoch, 0, n) for epoch in (0, 1)}
    for step, fresh in ((1, False), (3, True), (7, False)):
        data = build(kind, tmp_path, tokenizer) if fresh else whole
        for start in range(0, n, step):  # epochs in turn, as two ranks or a resumed run may ask
            for epoch in (1, 0):
                stop = min(start + step, n)
                for part, all_rows in zip(data.rows(epoch, start, stop), expected[epoch], strict=True):
                    assert part is all_rows is None or torch.equal(part, all_rows[start:stop])
    padding = whole.rows(0, whole.num_rows + 3, n)
    assert len(padding.input_ids) == 2 and padding.num_targets == 0 and not padding.input_ids.any()


def test_long_texts_are_encoded_in_pieces_and_come_out_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 7)
    texts = ["a" * 7, "b" * 8, "c" * 50, "汉字" * 9, "d"]
    data = pretrain(tmp_path, tokenizer, texts, 16)
    assert Counter(documents_of(data, 0)) == Counter(tuple(ids(text + "{e}")) for text in texts)
    assert (data.rows(0, 0, data.num_rows).input_ids == BOS).sum() == data.stats["documents"] == len(texts)


def test_text_cannot_become_a_special_token(tmp_path, tokenizer):
    data = pretrain(tmp_path, tokenizer, ["<s>a</s><unk>"], 64)
    labels = data.rows(0, 0, 1).labels.flatten().tolist()
    assert [label for label in labels if 0 <= label <= 2] == [EOS]


# ----------------------------------------------------------------------------------------------------- SFT


def sft(tmp_path, tokenizer, conversations, max_seq_len, **options) -> SFTData:
    path = write_jsonl(tmp_path / "s.jsonl", [{"conversations": messages} for messages in conversations])
    return SFTData(path, tokenizer, max_seq_len, **options)


def test_rows_of_conversations_written_by_hand(tmp_path, tokenizer):
    data = sft(tmp_path, tokenizer, [chat("Q", "AB", "R", "C"), chat("q", "d", system="S")], 100)
    batch = data.rows(0, 0, 1)
    first = "{s}user\nQ{e}\n{s}assistant\n", "AB{e}", "\n{s}user\nR{e}\n{s}assistant\n", "C{e}"
    second = "S{s}user\nq{e}\n{s}assistant\n", "d{e}"
    inputs = [ids("".join(first))[:-1], ids("".join(second))[:-1]]
    labels = []
    for pieces in (first, second):
        labels.append([i if n % 2 else IGNORE for n, piece in enumerate(pieces) for i in ids(piece)][1:])
    padding = 100 - len(inputs[0] + inputs[1])
    assert batch.input_ids.tolist() == [inputs[0] + inputs[1] + [0] * padding]
    assert batch.labels.tolist() == [labels[0] + labels[1] + [IGNORE] * padding]
    assert batch.documents.tolist() == [[1] * len(inputs[0]) + [2] * len(inputs[1]) + [0] * padding]
    assert (data.num_rows, data.num_tokens, data.num_bytes) == (1, 7, 4)


def answers_of(data: SFTData, epoch: int) -> list[tuple]:
    """(trained tokens, inputs) of every conversation of an epoch."""
    found = []
    batch = data.rows(epoch, 0, data.num_rows)
    for inputs, labels, numbers in zip(*(x.numpy() for x in batch), strict=True):
        assert (np.diff(numbers[numbers > 0]) >= 0).all() and (np.diff((numbers > 0).astype(int)) <= 0).all()
        for number in range(1, numbers.max() + 1):
            trained = labels[numbers == number]
            found.append((tuple(trained[trained != IGNORE].tolist()), tuple(inputs[numbers == number].tolist())))
    return found


def test_every_conversation_is_trained_once_an_epoch_and_its_answers_only(tmp_path, tokenizer):
    conversations = [chat(t, t.upper(), "again", t[::-1]) for t in some_texts(150, 30)]
    data = sft(tmp_path, tokenizer, conversations, 256)
    expected = Counter(tuple(ids(f"{c[1]['content']}{{e}}{c[3]['content']}{{e}}")) for c in conversations)
    epochs = [answers_of(data, epoch) for epoch in range(3)]
    assert all(Counter(trained for trained, _ in found) == expected for found in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert data.num_tokens == sum(len(trained) for trained, _ in epochs[0])
    assert data.num_bytes == sum(len(c[1]["content"] + c[3]["content"]) for c in conversations)
    assert data.stats["conversations"] == 150 and data.stats["fill"] >= 0.9


def test_an_over_long_conversation_is_cut_between_turns(tmp_path, tokenizer):
    frame = len(ids("{s}user\n{e}\n{s}assistant\n{e}\n"))
    turns = [
        "q" * 5,
        "a" * 5,
        "q" * 5,
        "b" * 5,
        "q" * 5,
        "c" * 500,
        "q" * 5,
        "d" * 5,
        "q" * 5,
        "e" * 5,
        "q" * 5,
        "f" * 5,
    ]
    room = 3 + 2 * (frame + 10)  # the system text and two turns
    data = sft(tmp_path, tokenizer, [chat(*turns, system="SYS")], room - 1 - 1)  # -1 "\n" behind </s>, -1 label
    parts = sorted(answers_of(data, 0))
    assert [trained for trained, _ in parts] == [
        tuple(ids("aaaaa{e}bbbbb{e}")), tuple(ids("ddddd{e}eeeee{e}")), tuple(ids("fffff{e}")),
    ]  # fmt: skip
    assert all(inputs[:4] == tuple(ids("SYS{s}")) for _, inputs in parts)
    assert data.num_bytes == 25
    assert data.stats["conversations"] == 1 and data.stats["conversations cut"] == 1
    one_less = sft(tmp_path, tokenizer, [chat(*turns, system="SYS")], room - 3)
    assert len(answers_of(one_less, 0)) == 5


def test_a_conversation_that_fits_exactly_is_whole_and_a_longer_one_is_dropped(tmp_path, tokenizer, capsys):
    long, longer = chat("q", "a" * 20), chat("q", "b" * 21)
    max_seq_len = len(ids("{s}user\nq{e}\n{s}assistant\n{e}")) + 20 - 1
    data = sft(tmp_path, tokenizer, [long, longer], max_seq_len)
    assert answers_of(data, 0)[0][0] == tuple(ids("a" * 20 + "{e}")) and data.num_rows == 1
    assert data.stats["not used"] == {"too long": 1} and data.stats["fill"] == 1
    assert "1 records not used: 1 too long" in capsys.readouterr().err


def naive_rows(lengths: list[int], capacity: int) -> int:
    """How many rows best fit decreasing takes, item by item."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - length)
    return len(spaces)


@given(capacity=st.integers(1, 50), data=st.data())
@settings(deadline=None)
def test_packing_is_best_fit_and_loses_nothing(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80)), dtype=np.int64)
    items, starts = pack(lengths, capacity, np.random.default_rng(0))
    assert sorted(items.tolist()) == list(range(len(lengths)))
    assert starts[0] == 0 and starts[-1] == len(items) and (np.diff(starts) > 0).all()
    assert all(lengths[items[a:b]].sum() <= capacity for a, b in zip(starts, starts[1:], strict=False))
    assert len(starts) - 1 == naive_rows(lengths.tolist(), capacity)


@pytest.mark.parametrize("mean", [3.5, 4.5, 5.5])
def test_packing_wastes_little(mean):
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(mean, 0.8, 20_000).astype(int), 12, 512)
    _, starts = pack(lengths, 512, random)
    assert lengths.sum() / (512 * (len(starts) - 1)) >= 0.9


def test_what_does_not_fit_a_row_is_no_silent_loss():
    with pytest.raises(ValueError, match="do not fit rows of 8"):
        pack(np.array([3, 9]), 8, np.random.default_rng(0))


def test_real_instructions_waste_little(tmp_path, shared_data):
    path = tmp_path / "s.json"
    records = json.loads((shared_data / "sft/alpaca_zh.json").read_text("utf-8"))
    path.write_text(json.dumps(records[:3000]))
    data = SFTData(path, Tokenizer((shared_data / "minimind_v1_tokenizer/tokenizer.json").read_text("utf-8")), 512)
    assert data.stats["fill"] >= 0.95 and data.stats["conversations"] > 2900
    assert data.rows(0, 0, data.num_rows).num_targets == data.num_tokens


# --------------------------------------------------------------------------------------------------- cache


def stamp(path: Path) -> list:
    return [(p.name, (p / "tokens.bin").stat().st_mtime_ns) for p in caches(path)]


def test_the_cache_is_built_once_and_again_when_file_or_tokenizer_change(tmp_path, tokenizer):
    path = write_csv(tmp_path / "p.csv", ["text"], [["one"], ["two"]])
    first = PretrainData(path, tokenizer, 16)
    built = stamp(path)
    assert (
        len(built) == 1 and json.loads((caches(path)[0] / "meta.json").read_text())["arrays"]["tokens"][0] == "uint16"
    )
    PretrainData(path, tokenizer, 8, isolate=True, seed=3)  # none of these changes the arrays
    assert stamp(path) == built

    other = byte_tokenizer([("o", "n"), ("on", "e")])
    assert PretrainData(path, other, 16).num_tokens == first.num_tokens - 2
    assert len(stamp(path)) == 2 and set(built) < set(stamp(path))  # the first stays valid

    status = path.stat()
    write_csv(path, ["text"], [["one"], ["TWO"]])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    changed = PretrainData(path, tokenizer, 16)
    assert set(documents_of(changed, 0)) == {tuple(ids("one{e}")), tuple(ids("TWO{e}"))}
    assert len(caches(path)) == 1 and not set(stamp(path)) & set(built)  # both old ones are gone
    assert set(documents_of(first, 0)) == {tuple(ids("one{e}")), tuple(ids("two{e}"))}  # still mapped


def test_the_cache_of_conversations_depends_on_the_row_length_and_few_are_kept(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "s.jsonl", [{"conversations": chat("q", "a")}])
    stamps = {}
    for max_seq_len in (64, 65, 66, 64, 67, 68):
        before = stamp(path)
        SFTData(path, tokenizer, max_seq_len)
        stamps[max_seq_len] = [s for s in stamp(path) if s not in before] or stamps[max_seq_len]
    assert len(caches(path)) == dataset.CACHES_KEPT
    assert stamps[64][0] in stamp(path) and stamps[65][0] not in stamp(path)  # the longest unused is gone


@pytest.mark.parametrize("damage", ["tokens.bin", "offsets.bin", "meta.json"])
def test_a_damaged_cache_is_built_again(tmp_path, tokenizer, damage):
    data = pretrain(tmp_path, tokenizer, some_texts(30), 16)
    expected = documents_of(data, 0)
    file = caches(data.path)[0] / damage
    file.write_bytes(file.read_bytes()[:-20])
    assert documents_of(PretrainData(data.path, tokenizer, 16), 0) == expected
    file.unlink()
    assert documents_of(PretrainData(data.path, tokenizer, 16), 0) == expected


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    large = byte_tokenizer()
    large.vocab_size = 70_000
    data = pretrain(tmp_path, large, ["abc"], 4)
    assert data.rows(0, 0, 1).input_ids.tolist() == [ids("{s}abc")]
    assert (caches(data.path)[0] / "tokens.bin").stat().st_size == 5 * 4


def test_what_cannot_be_used_is_counted_and_the_first_are_shown(tmp_path, tokenizer, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n' + '{"txt": "x"}\n' * 8 + "oops\n" + '{"text": "good"}\n')
    data = PretrainData(path, tokenizer, 16)
    assert data.stats["documents"] == 2
    assert data.stats["not used"] == {"text is not a string": 1, "no key 'text'": 8, "not JSON": 1}
    shown = capsys.readouterr().err.splitlines()
    assert (
        shown[0] == f"{path}:2: text is not a string: 3"
        and shown[1] == f"{path}:3: no key 'text': the keys are ['txt']"
    )
    assert len(shown) == 6 and "10 records not used: 8 no key 'text'" in shown[-1]
    PretrainData(path, tokenizer, 16)
    assert capsys.readouterr().err == ""
    json.dumps(data.stats)


def test_files_that_cannot_be_used_say_what_to_do(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"none\.csv does not exist.*python data_process\.py pretrain"):
        PretrainData(tmp_path / "none.csv", tokenizer, 16)
    path = write_csv(tmp_path / "p.csv", ["content"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"nothing to train on.*header text.* of 2: .*p\.csv:2: no key 'text'"):
        PretrainData(path, tokenizer, 16)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="nothing to train on"):
        SFTData(tmp_path / "empty.csv", tokenizer, 16)
    with pytest.raises(ValueError, match="nothing to train on"):
        sft(tmp_path, tokenizer, [chat("q", "a" * 100)], 16)
    assert not caches(path) and not caches(tmp_path / "s.jsonl")


def test_a_full_disk_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        pretrain(tmp_path, tokenizer, ["a"], 16)
    assert caches(tmp_path / "p.csv") == []


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    path = write_csv(tmp_path / "p.csv", ["text"], [["a"]])
    encode = dataset._encode_file

    def growing(*args):
        yield from encode(*args)
        with open(path, "a") as file:
            file.write("more\n")

    monkeypatch.setattr(dataset, "_encode_file", growing)
    with pytest.raises(ValueError, match="changed while it was read"):
        PretrainData(path, tokenizer, 16)
    assert caches(path) == []


def test_the_order_of_the_file_does_not_depend_on_the_threads(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 50)
    texts = some_texts(300)
    one = documents_of(pretrain(tmp_path, tokenizer, texts, 16, workers=1), 0)
    assert one == documents_of(pretrain(tmp_path, tokenizer, texts, 16, workers=4), 0)


# ------------------------------------------------------------------------------- other processes, kills, memory

SCRIPT = """
import hashlib, resource, sys
sys.path[:0] = [{repo!r}, {repo!r} + "/tests"]
from test_dataset import byte_tokenizer
from model import dataset
build = dataset._build
def told(*args):
    print("builds", flush=True)
    build(*args)
dataset._build = told
data = dataset.PretrainData(sys.argv[1], byte_tokenizer(), 512)
digest, n = hashlib.sha256(), max(1, data.num_rows // 2000)
for start in range(0, data.num_rows - 16, 16 * n):
    digest.update(data.rows(0, start, start + 16).input_ids.numpy())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(digest.hexdigest(), peak * (1 if sys.platform == "darwin" else 1024))
"""


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.format(repo=str(REPO)), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def corpus(path: Path, megabytes: float) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        file.write("text\n")
        for i in range(int(megabytes * 1000)):
            file.write(f"{i} " + "word " * 200 + "\n")
    return path


def test_a_kill_during_the_build_leaves_nothing_that_is_taken_for_whole(tmp_path):
    path = corpus(tmp_path / "p.csv", 4)
    for delay in (0, 0.05, 0.15):
        process = start(path)
        while not caches(path) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(delay)
        if not any(folder.suffix.startswith(".tmp") for folder in caches(path)):
            pytest.skip("this machine builds the cache too fast to be killed during it")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = caches(path)
        assert len(left) == 1 and left[0].suffix.startswith(".tmp")
    out, _ = start(path).communicate()
    assert out.startswith("builds\n") and len(caches(path)) == 1 and not caches(path)[0].suffix.startswith(".tmp")
    assert json.loads((caches(path)[0] / "meta.json").read_text())["counts"]["documents"] == 4000


def test_two_processes_at_once_build_once_and_read_the_same(tmp_path):
    path = corpus(tmp_path / "p.csv", 2)
    outputs = [process.communicate()[0].split() for process in [start(path), start(path)]]
    assert sorted(len(output) for output in outputs) == [2, 3] and outputs[0][-2] == outputs[1][-2]
    assert len(caches(path)) == 1


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []  # bytes: of a process that builds the cache, of one that finds it
    for megabytes in (3, 18):
        path = corpus(tmp_path / f"{megabytes}.csv", megabytes)
        peaks.append([int(start(path).communicate()[0].split()[-1]) for _ in range(2)])
        assert sum(file.stat().st_size for file in caches(path)[0].iterdir()) > 2e6 * megabytes
    assert peaks[1][0] - peaks[0][0] < 15e6 and peaks[1][1] - peaks[0][1] < 10e6
