"""Constrained decoding: replies that are one JSON object (RFC 8259), whatever the model would rather say.

Three parts: an automaton that reads JSON byte by byte, the vocabulary as a trie, and JsonConstraint, which walks the
trie through the automaton to find the tokens that may come next. A token may end within a character, an escape or a
number, and may close several brackets.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from model.tokenizer import Tokenizer

MAX_SPACE = 8  # whitespace characters in a row: a model could go on with them for ever
MAX_DEPTH = 32  # objects and arrays within one another

# ---------------------------------------------------------------- 1. the automaton

BRACKETS = ("{", "}", "[", "]", ",")  # in the rules, instead of a state: what follows depends on what is open
START, DONE = "start 0", "done"


@cache
def rules() -> dict[str, dict[int, str]]:
    """For every state, what each byte that may come leads to: a state, or one of BRACKETS."""
    table: dict[str, dict[int, str]] = {DONE: {}}

    def add(state: str, chars: Iterable[int], target: str) -> None:
        table.setdefault(state, {}).update(dict.fromkeys(chars, target))

    for kind, after in (("key", "colon 0"), ("text", "after 0")):  # a string, as a key or as a value
        _add_string(add, kind, after)
    for word in ("true", "false", "null"):
        for n in range(1, len(word)):
            add(word[:n], word[n].encode(), word[: n + 1] if n + 1 < len(word) else "after 0")

    def add_values(state: str) -> None:
        for char, target in {'"': "text", "-": "-", "0": "0", "t": "t", "f": "f", "n": "n", "{": "{", "[": "["}.items():
            add(state, char.encode(), target)
        add(state, b"123456789", "1")

    def add_end(state: str) -> None:
        for char in ",}]":
            add(state, char.encode(), char)

    # Places where whitespace may stand, so many characters of it being there already.
    for spaces in range(MAX_SPACE + 1):
        for place in ("start", "value", "first value", "next key", "first key", "colon", "after"):
            if spaces < MAX_SPACE:
                add(f"{place} {spaces}", b" \t\n\r", f"{place} {spaces + 1}")
        add(f"start {spaces}", b"{", "{")
        add(f"first key {spaces}", b"}", "}")
        add(f"first key {spaces}", b'"', "key")
        add(f"next key {spaces}", b'"', "key")
        add(f"colon {spaces}", b":", "value 0")
        add(f"first value {spaces}", b"]", "]")
        add_values(f"first value {spaces}")
        add_values(f"value {spaces}")
        add_end(f"after {spaces}")

    # Numbers: the state is what the number looks like so far.
    digits = b"0123456789"
    add("-", b"0", "0")
    add("-", b"123456789", "1")
    add("1", digits, "1")
    for state in ("0", "1"):
        add(state, b".", "1.")
    add("1.", digits, "1.1")
    add("1.1", digits, "1.1")
    for state in ("0", "1", "1.1"):
        add(state, b"eE", "1e")
    add("1e", b"+-", "1e+")
    for state in ("1e", "1e+", "1e1"):
        add(state, digits, "1e1")
    for state in ("0", "1", "1.1", "1e1"):  # may end here
        add(state, b" \t\n\r", "after 1")
        add_end(state)
    return table


def _add_string(add, kind: str, after: str) -> None:
    """The rules within a string. UTF-8 as in RFC 3629, section 4: no surrogates, no character longer than need be."""
    add(kind, range(0x20, 0x80), kind)
    add(kind, b'"', after)
    middle = range(0x80, 0xC0)
    for first, second, rest in (  # bytes that a character may begin with, its second byte, how many more there are
        (range(0xC2, 0xE0), middle, 0),
        ([0xE0], range(0xA0, 0xC0), 1),
        ([*range(0xE1, 0xED), 0xEE, 0xEF], middle, 1),
        ([0xED], range(0x80, 0xA0), 1),
        ([0xF0], range(0x90, 0xC0), 2),
        (range(0xF1, 0xF4), middle, 2),
        ([0xF4], range(0x80, 0x90), 2),
    ):
        add(kind, first, f"{kind} {first[0]:x}")
        add(f"{kind} {first[0]:x}", second, f"{kind} +{rest}" if rest else kind)
    add(f"{kind} +2", middle, f"{kind} +1")
    add(f"{kind} +1", middle, kind)

    # \uXXXX. After the first half of a surrogate pair, \uD800 to \uDBFF, must come the second, \uDC00 to \uDFFF.
    digits = b"0123456789abcdefABCDEF"
    add(kind, b"\\", f"{kind} \\")
    add(f"{kind} \\", b'"\\/bfnrt', kind)
    add(f"{kind} \\", b"u", f"{kind} u")
    add(f"{kind} u", digits, f"{kind} u0")
    add(f"{kind} u", b"dD", f"{kind} ud")
    add(f"{kind} u0", digits, f"{kind} u00")
    add(f"{kind} ud", b"01234567", f"{kind} u00")
    add(f"{kind} ud", b"89abAB", f"{kind} ud8")
    add(f"{kind} u00", digits, f"{kind} u000")
    add(f"{kind} u000", digits, kind)
    add(f"{kind} ud8", digits, f"{kind} ud80")
    add(f"{kind} ud80", digits, f"{kind} half")
    add(f"{kind} half", b"\\", f"{kind} half \\")
    add(f"{kind} half \\", b"u", f"{kind} half u")
    add(f"{kind} half u", b"dD", f"{kind} half ud")
    add(f"{kind} half ud", b"cdefCDEF", f"{kind} u00")


def after_bracket(bracket: str, opened: str, room: int) -> tuple[str, str] | None:
    """(state, what is open) after one of BRACKETS; None if it may not stand there.

    opened: the brackets that are open, outermost first. room: how many more may be opened.
    """
    if bracket == ",":
        return ("next key 0" if opened[-1] == "{" else "value 0"), opened
    if bracket in "{[":
        return ("first key 0" if bracket == "{" else "first value 0", opened + bracket) if room else None
    if opened[-1] + bracket not in ("{}", "[]"):
        return None
    return "after 0" if len(opened) > 1 else DONE, opened[:-1]


# ---------------------------------------------------------------- 2. the vocabulary


class _Trie:
    """The bytes of all tokens as a tree, and the masks found so far. Node 0 is the root."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.children: list[dict[int, int]] = [{}]
        self.ids: list[list[int]] = [[]]  # the tokens that end at a node
        self.vocab_size = tokenizer.vocab_size
        self.most = 0  # brackets in one token
        for id in range(tokenizer.vocab_size):
            text, node = tokenizer.token_bytes(id), 0
            for byte in text:
                if byte not in self.children[node]:
                    self.children[node][byte] = len(self.ids)
                    self.children.append({})
                    self.ids.append([])
                node = self.children[node][byte]
            if text:  # a special token has none
                self.ids[node].append(id)
            self.most = max(self.most, sum(text.count(char) for char in b"{}[]"))
        self.flat_walks: dict[tuple[int, str], tuple[list[int], list[tuple[int, str]]]] = {}
        self.masks: dict[tuple[str, str, int], Tensor] = {}

    def flat_walk(self, node: int, state: str) -> tuple[list[int], list[tuple[int, str]]]:
        """From a node in a state as far as no bracket comes: the tokens met, and the nodes after a bracket with it."""
        if (node, state) not in self.flat_walks:
            table, ids, brackets = rules(), [], []
            todo = [(node, state)]
            for here, now in todo:  # grows meanwhile
                for byte, child in self.children[here].items():
                    target = table[now].get(byte)
                    if target in BRACKETS:
                        brackets.append((child, target))
                    elif target:
                        ids += self.ids[child]
                        todo.append((child, target))
            self.flat_walks[node, state] = ids, brackets
        return self.flat_walks[node, state]

    def walk(self, node: int, state: str, opened: str, room: int) -> list[int]:
        """The tokens below a node that the automaton takes from this state."""
        ids, brackets = self.flat_walk(node, state)
        ids = ids.copy()
        for child, bracket in brackets:
            if after := after_bracket(bracket, opened, room):
                ids += self.ids[child] + self.walk(child, *after, room + len(opened) - len(after[1]))
        return ids

    def mask(self, ids: list[int]) -> Tensor:
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[ids] = True
        return mask

    def allowed(self, state: str, opened: str) -> Tensor:
        # A token reads no more of what is open than it can close, and what is then innermost.
        key = state, opened[-self.most - 1 :], min(MAX_DEPTH - len(opened), self.most)
        if key not in self.masks:
            if len(self.masks) >= 4096:
                self.masks.clear()
            self.masks[key] = self.mask([Tokenizer.eos_id] if state == DONE else self.walk(0, *key))
        return self.masks[key]


_TRIES: dict[str, _Trie] = {}  # by the tokenizer's fingerprint


# ---------------------------------------------------------------- 3. the constraint


class JsonConstraint:
    """Allows only what keeps a reply the beginning of one JSON object, and its end only after the object.

    Whitespace between two parts is limited to MAX_SPACE characters, depth to MAX_DEPTH; after the object comes nothing.
    Characters beyond U+FFFF that are written as escapes are whole pairs.

    Args:
        starts: texts of which one must come before the object; none may be the beginning of another.
    """

    def __init__(self, tokenizer: Tokenizer, starts: Sequence[str] = ()) -> None:
        if tokenizer.fingerprint not in _TRIES:
            _TRIES[tokenizer.fingerprint] = _Trie(tokenizer)
        self.trie = _TRIES[tokenizer.fingerprint]
        self.tokenizer = tokenizer
        self.starts = [start.encode() for start in starts if start]  # what is left of those that still may come
        self.state, self.opened = START, ""

    def allowed(self) -> Tensor:
        """The tokens that may come next, the end token included. Shared: not to be written to.

        Shapes: (V,), bool.
        """
        if not self.starts:
            return self.trie.allowed(self.state, self.opened)
        ids: list[int] = []
        for start in self.starts:
            node: int | None = 0
            for byte in start:
                node = self.trie.children[node].get(byte)
                if node is None:
                    break
                ids += self.trie.ids[node]
            else:
                ids += self.trie.walk(node, START, "", MAX_DEPTH)
        return self.trie.mask(ids)

    def push(self, token_id: int) -> None:
        """Notes that this token has come. Raises: ValueError if it was not allowed."""
        if not self.allowed()[token_id]:
            raise ValueError(f"token {token_id} may not come here: the reply would be no JSON object")
        for byte in self.tokenizer.token_bytes(token_id):
            if self.starts:
                left = [start[1:] for start in self.starts if start[0] == byte]
                self.starts = left if all(left) else []
                continue
            target = rules()[self.state][byte]
            if target in BRACKETS:
                self.state, self.opened = after_bracket(target, self.opened, MAX_DEPTH - len(self.opened))
            else:
                self.state = target
