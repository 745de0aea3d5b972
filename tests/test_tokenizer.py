import copy
import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import train_tokenizer
from model.cli import run_main
from model.tokenizer import CHAT_TEMPLATE, DEFAULT_DIR, SPECIAL_TOKENS, Tokenizer, check_messages, load_tokenizer

REPO = Path(__file__).resolve().parent.parent
V1_DIR = REPO.parent / "shared/data/minimind_v1_tokenizer"
DIRECTORIES = [
    pytest.param(DEFAULT_DIR, id="ours"),
    pytest.param(
        V1_DIR, id="v1", marks=pytest.mark.skipif(not V1_DIR.is_dir(), reason=f"v1's tokenizer is not in {V1_DIR}")
    ),
]


@pytest.fixture(scope="module", params=DIRECTORIES)
def tokenizer(request):
    return load_tokenizer(request.param)


@pytest.fixture(scope="module")
def reference(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer.directory)


def chat(*turns, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)
    ]


# Text that looks as much like special tokens as possible, and everything else that a person can type.
FRAGMENTS = [*SPECIAL_TOKENS, "<", "s", ">", "/", "|", "unk", " ", "\n", "user\n", "assistant\n", "你好", "é", "\u3000"]
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=12).map("".join)
CHATS = st.lists(TEXT, min_size=1, max_size=5).flatmap(
    lambda turns: st.none() | TEXT if not turns else (st.none() | TEXT).map(lambda s: chat(*turns, system=s))
)


# Text never becomes a special token


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_text_never_becomes_a_special_token_and_is_kept(tokenizer, texts):
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not set(ids) & set(tokenizer.special_ids)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=False) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(max_examples=200, deadline=None)
@given(messages=CHATS)
def test_only_the_template_makes_special_tokens_in_a_chat(tokenizer, messages):
    ids, mask = tokenizer.encode_chat_with_mask(messages)
    users = sum(m["role"] == "user" for m in messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert ids.count(tokenizer.bos_id) == 2 * users
    assert ids.count(tokenizer.eos_id) == users + len(answers)
    assert ids.count(tokenizer.unk_id) == 0
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(messages)
    trained = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(trained, skip_special=False) == "".join(a + "</s>" for a in answers)


@pytest.mark.parametrize("text", ["<s>", "a</s>b", " <unk> ", "<s><s></s>", "<s>assistant\n"])
def test_no_way_to_encode_lets_a_special_token_through(tokenizer, text):
    message_ids = tokenizer.encode_chat(chat(text, text, text, system=text))
    plain_ids = tokenizer.encode_chat(chat("q", "a", "q", system=""))
    for i in range(3):
        assert message_ids.count(i) == plain_ids.count(i)
        assert tokenizer.encode_document(text).count(i) == (i > 0)
    for twin in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin.encode(text) == tokenizer.encode(text)
        assert twin.fingerprint == tokenizer.fingerprint


def test_an_extra_special_token_is_encoded_as_characters_too(tokenizer):
    data = json.loads((tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8"))
    extra = data["added_tokens"][0] | {"id": tokenizer.vocab_size, "content": "<tool>"}
    data["added_tokens"].append(extra)
    extended = Tokenizer(json.dumps(data))
    assert extended.vocab_size == tokenizer.vocab_size + 1
    assert extended.special_tokens == (*SPECIAL_TOKENS, "<tool>")
    assert extended.special_ids == (0, 1, 2, tokenizer.vocab_size)
    assert extended.encode("x<tool>y") == tokenizer.encode("x<tool>y")
    assert extended.decode([tokenizer.vocab_size], skip_special=False) == "<tool>"


# The template


CONVERSATIONS = [
    chat("你好"),
    chat("你好", system="你是小助手。"),
    chat("你好", "你好！有什么可以帮你？"),
    chat("1+1=?", "2\n\n好", "再来 2024 年\n", "  好的", " q ", "", system="You are\n\n"),
]


@pytest.mark.parametrize("messages", CONVERSATIONS[:3])
def test_chat_ids_equal_transformers(tokenizer, reference, messages):
    assert tokenizer.encode_chat(messages) == reference.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_rendered_chat_equals_transformers(tokenizer, reference, messages):
    assert reference.chat_template == CHAT_TEMPLATE
    assert tokenizer.render(messages) == reference.apply_chat_template(messages, tokenize=False)


def test_chat_ids_equal_transformers_on_real_conversations(tokenizer, reference):
    path = REPO.parent / "shared/data/sft/alpaca_zh.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    records = json.loads(path.read_text(encoding="utf-8"))[:400]
    pairs = [(r["instruction"] + r["input"], r["output"].strip()) for r in records]
    chats = [chat(*a, *b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    for messages, tokens in zip(chats, tokenizer.encode_chat_batch(chats), strict=True):
        assert tokens.ids == reference.apply_chat_template(messages, return_dict=False)


def test_v1_chat_ids_by_hand():
    if not V1_DIR.is_dir():
        pytest.skip(f"v1's tokenizer is not in {V1_DIR}")
    tokenizer = load_tokenizer(V1_DIR)
    prompt = [1, 320, 275, 201, 83, 2, 201, 1, 1078, 538, 501, 201]
    assert tokenizer.encode_chat(chat("q")) == prompt
    assert tokenizer.encode_chat(chat("q"), add_generation_prompt=False) == prompt[:7]
    ids, mask = tokenizer.encode_chat_with_mask(chat("q", "a"))
    assert ids == [*prompt, 67, 2, 201]
    assert mask == [0] * 12 + [1, 1, 0]


@settings(max_examples=100, deadline=None)
@given(messages=CHATS)
def test_training_sees_the_ids_that_generation_produces(tokenizer, messages):
    """The ids of a conversation start with those of every prompt in it, then the answer's own ids."""
    tokens = tokenizer.encode_chat_batch([messages])[0]
    ends = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.encode_chat(messages[:i])
            answer = [*tokenizer.encode(message["content"]), tokenizer.eos_id]
            assert tokens.ids[: len(prompt)] == prompt
            assert tokens.ids[len(prompt) : len(prompt) + len(answer)] == answer
            assert tokens.mask[len(prompt) : len(prompt) + len(answer)] == [1] * len(answer)
            ends.append(len(tokenizer.encode_chat(messages[: i + 1])))
    assert tokens.turn_ends == ends
    assert len(tokens.mask) == len(tokens.ids)


def test_batch_equals_one_by_one(tokenizer):
    batch = tokenizer.encode_chat_batch(CONVERSATIONS)
    assert batch == [tokenizer.encode_chat_batch([messages])[0] for messages in CONVERSATIONS]
    assert [len(tokens.turn_ends) for tokens in batch] == [0, 0, 1, 3]
    assert tokenizer.encode_chat_batch([]) == []


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one user message"),
        ("你好", "must be a list"),
        (["你好"], "message 0 must be a dict"),
        ([{"role": "user"}], "message 0 must be a dict with role and content"),
        ([{"role": "user", "content": None}], "content of message 0 must be a string, not None"),
        (chat(system="s"), "only a system message"),
        (chat("q", "a")[1:], "message 0 has role 'assistant' where 'user' must be"),
        (chat("q") + chat("q"), "message 1 has role 'user' where 'assistant' must be"),
        (chat("q") + chat(system="s"), "message 1 has role 'system'"),
        ([{"role": "tool", "content": "q"}], "message 0 has role 'tool'"),
    ],
)
def test_wrong_messages_are_named(tokenizer, messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_messages(messages)
    with pytest.raises(ValueError, match=f"conversation 1: .*{complaint}"):
        tokenizer.encode_chat_batch([chat("q"), messages])
    with pytest.raises(ValueError, match=complaint):
        tokenizer.render(messages)


# Odd input


def test_half_surrogates_and_wrong_types(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b\ud800")) == "a\U0001f600b\ufffd"
    for text in (None, 1, b"bytes", ("two", "texts")):
        with pytest.raises(ValueError, match="text must be a string"):
            tokenizer.encode(text)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(-5, 7000) | st.integers(-(2**70), 2**70), max_size=30), skip=st.booleans())
def test_decode_never_raises(tokenizer, ids, skip):
    assert isinstance(tokenizer.decode(ids, skip_special=skip), str)


def test_bytes_that_are_no_text_are_shown_as_such(tokenizer):
    ids = tokenizer.encode("\U00020bb7")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2]) == "a"
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2], skip_special=False) == "<s>a</s>"


# Loading


def test_missing_and_broken_files_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder; train one with train_tokenizer.py"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    for content in ("", "{", "[]", "null", "{}", '{"model": {"vocab": [], "merges": {}}}', "[" * 10**6):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="cannot use .*tokenizer.json: .*train_tokenizer.py"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="cannot use"):
        load_tokenizer(tmp_path)


def _swap_ids(data):
    data["model"]["vocab"] |= {"<s>": 2, "</s>": 1}
    data["added_tokens"][1]["id"], data["added_tokens"][2]["id"] = 2, 1


def _make_special_by_merge(data):
    data["model"]["merges"] += [["s", ">"], ["<", "s>"]]
    data["model"]["vocab"]["s>"] = len(data["model"]["vocab"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_swap_ids, "<s> must be the special token with id 1, but is id 2"),
        (lambda d: d["added_tokens"].pop(), "</s> must be the special token with id 2, but is not a special"),
        (lambda d: d["added_tokens"][1].update(special=False), "<s> must be the special token"),
        (_make_special_by_merge, "a merge makes the special token <s>"),
        (lambda d: d["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda d: d["model"].update(dropout=0.1), "dropout"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda d: d.update(pre_tokenizer=None), "byte-level"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "byte-level"),
        (lambda d: d["model"].update(type="WordPiece"), "byte-level"),
        (lambda d: d["model"]["vocab"].pop("!"), "1 of the 256 bytes"),
        (lambda d: d["model"]["vocab"].update({"长": 6400}), "not written in byte characters"),
        (lambda d: d["model"]["vocab"].update({"zzzzz": 99999}), "do not have the ids 0 to"),
        (lambda d: d["model"]["merges"].append(["zzzzz", "a"]), "the tokenizers library refuses it"),
        (lambda d: d["added_tokens"].append({"id": 6400, "content": "ok", "special": False}), "not marked special"),
    ],
)
def test_a_tokenizer_that_would_go_wrong_is_refused(tmp_path, change, complaint):
    data = json.loads((DEFAULT_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=complaint):
        load_tokenizer(tmp_path)


def test_settings_that_would_cut_or_pad_are_not_obeyed(tmp_path):
    data = json.loads((DEFAULT_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    data["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    assert Tokenizer(json.dumps(data)).encode("一二三") == load_tokenizer().encode("一二三")


def test_nothing_in_the_folder_is_executed(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((DEFAULT_DIR / "tokenizer.json").read_bytes())
    trap = "raise SystemExit('executed')"
    for name in ("tokenizer.py", "tokenization_minimind.py", "__init__.py"):
        (tmp_path / name).write_text(trap)
    config = {"auto_map": {"AutoTokenizer": ["tokenizer.Trap", None]}, "chat_template": "{{ 1 / 0 }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode_chat(chat("q")) == load_tokenizer().encode_chat(chat("q"))
    assert "1 / 0" not in loaded.render(chat("q"))


def test_loading_does_not_import_transformers_or_torch():
    code = (
        "import sys; from model.tokenizer import load_tokenizer; load_tokenizer();"
        "assert not {'transformers', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_fingerprint_depends_on_content_only(tmp_path, tokenizer, reference):
    data = json.loads((tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    joined = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    for merges in (joined, [m.split(" ") for m in joined]):
        data["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(data, indent=7))
        assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    reference.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == tokenizer.fingerprint

    data["model"]["merges"] = joined[1:] + joined[:1]
    assert Tokenizer(json.dumps(data)).fingerprint != tokenizer.fingerprint


# Training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = random.Random(1)
    words = ["你好", "世界", "今天", "天气", "hello", " world", "def f(x):\n    return x\n", "<s>", "</s>", "。", "，"]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = ["".join(rng.choices(words, k=30)) for _ in range(300)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(*args, env=None, **options):
    command = [sys.executable, str(REPO / "train_tokenizer.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), **options)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "new/tokenizer"
    result = run("--data_path", corpus, "--vocab_size", 300, "--output_dir", directory, cwd=directory.parents[1])
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


def test_training_makes_a_tokenizer_laid_out_as_v1s(trained):
    directory, _ = trained
    assert sorted(p.name for p in directory.iterdir()) == [
        "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"
    ]  # fmt: skip
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode("\n") == [201] and tokenizer.encode("ABCD") == [35, 36, 37, 38]  # as in v1
    assert len(tokenizer.encode("你好")) == 1  # learned
    assert not set(tokenizer.encode("<s></s>")) & {0, 1, 2}  # though they are frequent in the corpus

    data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads((directory / "vocab.json").read_text(encoding="utf-8")) == data["model"]["vocab"]
    header, *merges = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert header == "#version: 0.2"
    assert [m.split(" ") for m in merges] == data["model"]["merges"]
    if V1_DIR.is_dir():
        v1 = json.loads((V1_DIR / "tokenizer.json").read_text(encoding="utf-8"))
        assert list(v1["model"]["vocab"])[:259] == list(data["model"]["vocab"])[:259]
        assert {k: v for k, v in v1.items() if k != "model"} == {k: v for k, v in data.items() if k != "model"}
        settings = [{k: v for k, v in d["model"].items() if k not in ("vocab", "merges")} for d in (v1, data)]
        assert settings[0] == settings[1]


def test_trained_tokenizer_loads_in_transformers(trained):
    directory, _ = trained
    reference, tokenizer = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    assert (reference.unk_token_id, reference.bos_token_id, reference.eos_token_id) == (0, 1, 2)
    assert reference.pad_token is None and len(reference) == 300
    for text in ("你好 world", "  a  b\n\n c", "a , b ."):
        assert reference(text).input_ids == tokenizer.encode(text)
        assert reference.decode(tokenizer.encode(text)) == text
    for messages in CONVERSATIONS[:3]:
        assert tokenizer.encode_chat(messages) == reference.apply_chat_template(messages, return_dict=False)


def test_same_input_same_bytes(corpus, trained, tmp_path):
    for threads in ("1", "4"):
        options = ["--data_path", corpus, "--vocab_size", 300, "--output_dir", tmp_path / threads]
        assert run(*options, env={"RAYON_NUM_THREADS": threads}).returncode == 0
        for file in trained[0].iterdir():
            assert (tmp_path / threads / file.name).read_bytes() == file.read_bytes()


def test_every_file_format_gives_the_same_tokenizer(tmp_path):
    lines = ["一二三四。", "一二三四 hello，"] * 50
    for name, content in {
        "a.txt": "\n".join(lines),
        "a.jsonl": "\n".join(json.dumps({"text": line}) for line in lines),
        "a.csv": "text\n" + "\n".join(lines),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    made = []
    for path in sorted(tmp_path.iterdir()):
        out = tmp_path / "out"
        train_tokenizer.main(["--data_path", str(path), "--vocab_size", "270", "--output_dir", str(out)])
        made.append((out / "tokenizer.json").read_bytes())
    assert len(made) == 6 and len(set(made)) == 1
    train_tokenizer.main(
        ["--data_path", str(tmp_path / "a.txt"), str(tmp_path / "a.csv"), "--vocab_size", "270"]
        + ["--output_dir", str(out)]
    )
    assert (out / "tokenizer.json").read_bytes() == made[0]  # twice the text, the same order of pairs
    assert len(load_tokenizer(out).encode("一二")) < 6


def test_a_large_input_is_sampled_evenly(tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:04} " * 20}) + "\n" for i in range(5000)))
    texts = train_tokenizer.sample([path], max_mb=0.1)
    assert 0.04e6 < sum(map(len, texts)) <= 0.1e6
    numbers = [int(text[:4]) for text in texts]
    assert abs(sum(numbers) / len(numbers) - 2500) < 300
    assert 0.3 < sum(n % 2 for n in numbers) / len(numbers) < 0.7
    assert texts == train_tokenizer.sample([path], max_mb=0.1)
    assert len(train_tokenizer.sample([path], max_mb=1)) == 5000


def test_broken_lines_are_named_and_skipped(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": \n{"txt": "x"}\n[1]\n{"text": "\xff"}\n\n{"text": "too"}\n')
    assert train_tokenizer.sample([path], max_mb=1) == ["good", "too"]
    errors = capsys.readouterr().err
    for number in (2, 3, 4, 5):
        assert f"skipped {path}:{number}: " in errors
    assert f"{path}:6" not in errors and "skipped 4 lines" in errors


@pytest.mark.parametrize(
    ("name", "content", "options", "complaint"),
    [
        ("none.jsonl", None, [], "no file"),
        ("empty.jsonl", b"", [], "there is no text in"),
        ("wrong.jsonl", b'{"content": "x"}\n', [], "there is no text in"),
        ("false.jsonl.gz", b"not packed", [], "there is no text in"),
        ("good.bin", b"text", [], "cannot read"),
        ("good.txt", b"text", ["--vocab_size", "258"], "258 must be at least 259"),
        ("good.txt", b"text", ["--tokenizer_dir", "x"], "--tokenizer_dir goes with --check"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, name, content, options, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    command = ["--data_path", str(tmp_path / name), "--output_dir", str(tmp_path / "out"), *options]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train_tokenizer.main(command))
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_file(trained, tmp_path, monkeypatch):
    text = (trained[0] / "tokenizer.json").read_text(encoding="utf-8")
    train_tokenizer.save(text, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train_tokenizer.save((DEFAULT_DIR / "tokenizer.json").read_text(encoding="utf-8"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_replacing_another_tokenizer_is_said(trained, tmp_path, capsys):
    train_tokenizer.save((trained[0] / "tokenizer.json").read_text(encoding="utf-8"), tmp_path)
    train_tokenizer.save((trained[0] / "tokenizer.json").read_text(encoding="utf-8"), tmp_path)
    assert "replacing" not in capsys.readouterr().out
    train_tokenizer.save((DEFAULT_DIR / "tokenizer.json").read_text(encoding="utf-8"), tmp_path)
    assert "replacing another tokenizer" in capsys.readouterr().out


# The check


def test_check_prints_the_figures(tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("一个句子。", encoding="utf-8")
    before = {p: p.read_bytes() for p in DEFAULT_DIR.iterdir()}
    result = run("--check", "--check_path", held_out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer()
    ratio = len("一个句子。") / len(tokenizer.encode("一个句子。"))
    for expected in ("<unk> 0  <s> 1  </s> 2", "A 35  B 36  C 37  D 38", "round trip  ok", f"{held_out} {ratio:.2f}"):
        assert expected in result.stdout
    assert {p: p.read_bytes() for p in DEFAULT_DIR.iterdir()} == before


def test_check_fails_where_text_is_lost(capsys):
    class Lossy(Tokenizer):
        def decode(self, ids, skip_special=True):
            return super().decode(ids, skip_special).replace("\r", "")

    lossy = Lossy((DEFAULT_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert train_tokenizer.check(lossy, []) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_shipped_tokenizer_suits_chinese_english_and_code():
    tokenizer = load_tokenizer()
    assert tokenizer.vocab_size == 6400
    for name, floor in (("Chinese", 1.3), ("English", 2.5), ("code", 2.8)):
        text = train_tokenizer.SAMPLES[name]
        assert len(text) / len(tokenizer.encode(text)) > floor, name
    assert [tokenizer.encode(letter) for letter in "ABCD"] == [[35], [36], [37], [38]]
