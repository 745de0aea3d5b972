"""model/json_mode.py: what may come next against json.loads, against reading byte by byte, documents by the token."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.json_mode import MAX_DEPTH, MAX_SPACE, JsonConstraint, after_bracket, rules
from model.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
EOS = TOKENIZER.eos_id


class Bytes:
    """A tokenizer of all single bytes, with more tokens that hold several brackets."""

    fingerprint = "bytes"
    tokens = [
        b"",
        b"",
        b"",
        *(bytes([i]) for i in range(256)),
        b"}}",
        b"]}]",
        b'},{"',
        b"[[[",
        b'" : [',
        b"1e",
        b'}}}, "',
    ]
    vocab_size = len(tokens)

    def token_bytes(self, id: int) -> bytes:
        return self.tokens[id]


def after(text: bytes, tokenizer=None) -> JsonConstraint:
    """A constraint that has read these bytes, one by one."""
    constraint = JsonConstraint(tokenizer or Bytes())
    single = {constraint.tokenizer.token_bytes(id): id for id in range(constraint.tokenizer.vocab_size)}
    for byte in text:
        constraint.push(single[bytes([byte])])
    return constraint


def allowed_ids(constraint: JsonConstraint) -> list[int]:
    return constraint.allowed().nonzero().flatten().tolist()


def reads(constraint: JsonConstraint, text: bytes) -> bool:
    """Whether the automaton takes these bytes, read one by one without trie and cached masks."""
    state, opened = constraint.state, constraint.opened
    for byte in text:
        state = rules()[state].get(byte)
        if state is not None and state in ",[]{}":
            found = after_bracket(state, opened, MAX_DEPTH - len(opened))
            state, opened = found or (None, opened)
        if state is None:
            return False
    return True


def random_walk(seed: int, tokenizer, prefer_short: bool, steps: int = 200) -> tuple[JsonConstraint, bytes, bool]:
    """The constraint after random tokens, their bytes, and whether the end token came."""
    rng, constraint, text = random.Random(seed), JsonConstraint(tokenizer), b""
    for _ in range(steps):
        ids = allowed_ids(constraint)
        if prefer_short and rng.random() < 0.9:  # or nearly all would be words within one string
            ids = [
                id for id in ids if len(tokenizer.token_bytes(id)) < 2 and tokenizer.token_bytes(id) < b"\x7f"
            ] or ids
        id = rng.choice(ids)
        if id == EOS:
            return constraint, text, True
        constraint.push(id)
        text += tokenizer.token_bytes(id)
    return constraint, text, False


def completed(constraint: JsonConstraint, text: bytes) -> bytes:
    """The text made whole: what closes most comes first."""
    tokenizer = constraint.tokenizer
    single = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    order = [single[bytes([byte])] for byte in [*b'"}]:1{', *range(256)]]
    while not constraint.allowed()[EOS]:
        id = next(id for id in order if constraint.allowed()[id])
        constraint.push(id)
        text += tokenizer.token_bytes(id)
    return text


@pytest.mark.parametrize("prefer_short", [False, True])
def test_random_walks_are_beginnings_of_objects(prefer_short):
    ended = 0
    for seed in range(60):
        for tokenizer in (TOKENIZER, Bytes()):
            constraint, text, is_whole = random_walk(seed, tokenizer, prefer_short)
            ended += is_whole
            if not is_whole:
                text = completed(constraint, text)
            value = json.loads(text.decode())  # UTF-8 too
            assert isinstance(value, dict)
            json.dumps(value, ensure_ascii=False).encode()  # no half surrogate pair
            assert allowed_ids(constraint) == [EOS]
    assert ended > 20 or not prefer_short


STATES = [
    b"",
    b" ",
    b'{"',
    b'{"a":{"b":[[{"c":{"d":"',  # a token may close several
    b'{"a":[{"b":[[["e"',
    b'{"a":{"b":{"c":1',
    b'{"a":{"b":{"c":{"d":1',
    b'{"a":[[[[1e5',
    b'{"a":' + b"[" * (MAX_DEPTH - 1),
    b'{"a":' + b"[" * (MAX_DEPTH - 2) + b"1,",
    b'{"a":' + b"[" * (MAX_DEPTH - 4),
    b'{"a":"\\ud83d',
    b'{"\xe4\xbd',
    b'{"a":' + b" " * (MAX_SPACE - 1),
    b'{"a":-',
    b'{"a":t',
    b"{}",
]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Bytes()], ids=["minimind", "bytes"])
def test_masks_are_exact(tokenizer):
    constraints = [after(text, tokenizer) for text in STATES]
    constraints += [random_walk(seed, tokenizer, True, steps=4 + 3 * seed)[0] for seed in range(20)]
    for constraint in constraints:
        texts = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        expected = [id for id, text in enumerate(texts) if text and reads(constraint, text)]
        expected += [EOS] if constraint.state == "done" else []
        assert allowed_ids(constraint) == sorted(expected), (constraint.state, constraint.opened)
        assert expected, "a dead end"


def documents() -> list[dict]:
    rng = random.Random(1)
    words = [
        "北京",
        "天气",
        'a "quoted" word',
        "tab\tand\nline",
        "C:\\temp",
        "😀",
        "\u2028",
        "\x7f",
        "",
        "é",
        "null",
        "{[,:]}",
    ]

    def value(depth: int):
        kind = rng.randrange(9 if depth else 6)
        if kind > 6:
            return {rng.choice(words) + str(i): value(depth - 1) for i in range(rng.randrange(4))}
        if kind > 5:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        number = rng.choice([0, -1, 10**20, 1.5e-7, -2e300, 0.1, 123456.75])
        return [rng.choice(words), number, True, False, None, rng.choice(words) * 3][kind]

    return [{f"{rng.choice(words)}{i}": value(5) for i in range(rng.randrange(1, 5))} for _ in range(50)]


def test_documents_may_be_written_token_by_token():
    layouts = [{}, {"ensure_ascii": False}, {"ensure_ascii": False, "separators": (",", ":")}, {"indent": 1}]
    for document in documents():
        for layout in layouts:
            constraint = JsonConstraint(TOKENIZER)
            text = json.dumps(document, **layout)
            for id in [*TOKENIZER.encode(text), EOS]:
                constraint.push(id)  # raises if it is not allowed


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(), st.recursive(st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
       lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)))  # fmt: skip
def test_any_object_may_be_written(value):
    constraint = JsonConstraint(TOKENIZER)
    for id in [*TOKENIZER.encode(json.dumps(value, ensure_ascii=False)), EOS]:
        constraint.push(id)


@pytest.mark.parametrize(
    "text",
    [
        b"[",
        b'"',
        b"1",
        b"\xef",  # of a byte order mark
        b"{a",
        b"{'",
        b"{,",
        b'{"a"}',
        b'{"a",',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":[1,]',
        b'{"a":[,',
        b'{"a":[1}',
        b'{"a":01',
        b'{"a":+',
        b'{"a":.',
        b'{"a":1.}',
        b'{"a":1..',
        b'{"a":1.2.',
        b'{"a":1e}',
        b'{"a":1e+-',
        b'{"a":1ee',
        b'{"a":--',
        b'{"a":1 2',
        b'{"a":N',
        b'{"a":tR',
        b'{"a":nulll',
        b'{"a":"\n',
        b'{"a":"\\x',
        b'{"a":"\\u12G',
        b'{"a":"\\udc',  # the second half of a pair comes first
        b'{"a":"\\ud83dx',
        b'{"a":"\\ud83d\\n',
        b'{"a":"\\ud83d\\u0',
        b'{"a":"\\ud83d\\ud8',
        b'{"a":"\x80',
        b'{"a":"\xc0',
        b'{"a":"\xe0\x80',
        b'{"a":"\xed\xa0',
        b'{"a":"\xf0\x80',
        b'{"a":"\xf4\x90',
        b'{"a":"\xf5',
        b'{"a":"\xe4"',
        b'{"a":\x0b',
        b"{}}",
        b"{} ",
        b"{}{",
        b"{" + b" " * (MAX_SPACE + 1),
        b'{"a":' + b"[" * MAX_DEPTH,
    ],
)
def test_the_last_byte_is_refused(text):
    constraint = after(text[:-1])
    assert not constraint.allowed()[3 + text[-1]]
    with pytest.raises(ValueError, match="JSON object"):
        constraint.push(3 + text[-1])


def test_the_end_only_after_the_object():
    constraint = JsonConstraint(TOKENIZER)
    for id in TOKENIZER.encode('{"a": {"b": 1}'):
        with pytest.raises(ValueError, match="token 2 may not"):
            constraint.push(EOS)
        constraint.push(id)
    constraint.push(TOKENIZER.encode("}")[0])
    assert allowed_ids(constraint) == [EOS]
    constraint.push(EOS)


def test_one_of_the_starts_is_certain():
    starts = [" get_weather\nAction Input:", " get_time\nAction Input:"]
    texts = [TOKENIZER.token_bytes(id) for id in range(TOKENIZER.vocab_size)]
    seen = set()
    for seed in range(8):
        rng, constraint, text = random.Random(seed), JsonConstraint(TOKENIZER, starts), b""
        while constraint.starts:
            expected = []
            for id, token in enumerate(texts):
                longer = text + token
                fits = any(
                    s.startswith(longer) or longer.startswith(s) and reads(JsonConstraint(TOKENIZER), longer[len(s) :])
                    for s in map(str.encode, starts)
                )
                expected += [id] if token and fits else []
            assert allowed_ids(constraint) == expected
            id = rng.choice(expected)
            constraint.push(id)
            text += texts[id]
        name, _, arguments = completed(constraint, text).decode().partition("\nAction Input:")
        assert name + "\nAction Input:" in starts and isinstance(json.loads(arguments), dict)
        seen.add(name)
    assert len(seen) == 2
    assert JsonConstraint(TOKENIZER, [""]).allowed().equal(JsonConstraint(TOKENIZER).allowed())


def test_constraints_share_masks():
    one, other = JsonConstraint(TOKENIZER), JsonConstraint(load_tokenizer())
    assert one.allowed() is other.allowed()
