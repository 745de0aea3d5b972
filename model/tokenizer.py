"""Text to token ids and back, and the chat template. The only file that knows the special tokens.

Text is encoded with special tokens switched off: whatever a user types or a data file holds, "<s>" included,
becomes ordinary characters. The template's own markers are added as ids.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
DEFAULT_DIR = Path(__file__).resolve().parent / "minimind_tokenizer"

# v1's template, for tokenizer_config.json only: here conversations are put together by Tokenizer._layout.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% endif %}"
    "{% if system_message is defined %}{{ system_message }}{% endif %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<s>user\\n' + content + '</s>\\n<s>assistant\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ content + '</s>' + '\\n' }}{% endif %}{% endfor %}"
)


def tokenizer_config() -> dict:
    """Returns the content of tokenizer_config.json, which transformers' AutoTokenizer reads."""
    unk, bos, eos = SPECIAL_TOKENS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": token} | flags for i, token in enumerate(SPECIAL_TOKENS)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,  # only for transformers' warnings: the model sets the real limit
        "chat_template": CHAT_TEMPLATE,
    }


class ChatTokens(NamedTuple):
    """One encoded conversation; ids and mask have the same length."""

    ids: list[int]
    mask: list[int]  # 1 on answer tokens: the content of every assistant turn and its </s>
    turn_ends: list[int]  # index after each answer: the conversation may be cut to ids[:turn_ends[i]]


def load_tokenizer(directory: str | Path | None = None) -> "Tokenizer":
    """Returns the tokenizer in `directory` (default: model/minimind_tokenizer), read from its tokenizer.json.

    Nothing in the folder is executed; its chat template is not used.
    Raises: ValueError if the folder, the file or a special token is missing, or the file is not a byte-level
    BPE as train_tokenizer.py makes it.
    """
    directory = Path(DEFAULT_DIR if directory is None else directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        lacking = "tokenizer.json is missing from it" if directory.is_dir() else "there is no such folder"
        raise ValueError(
            f"no tokenizer in {directory}: {lacking}; train one with train_tokenizer.py "
            f"or give its folder with --tokenizer_dir"
        )
    try:
        return Tokenizer(file.read_text(encoding="utf-8"), directory)
    except ValueError as error:
        raise ValueError(
            f"cannot use {file}: {error}; train one with train_tokenizer.py or give another --tokenizer_dir"
        ) from None


def check_messages(messages: Sequence[dict]) -> None:
    """Raises ValueError, saying what is wrong, unless `messages` is [system], user, assistant, user, ...

    A message is a dict with the keys role and content, content a string. The last one may be of the user.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list with at least one user message, not {_short(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {i} must be a dict with role and content, not {_short(message)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"content of message {i} must be a string, not {_short(message['content'])}")
    roles = [message["role"] for message in messages]
    first = 1 if roles[0] == "system" else 0
    if len(roles) == first:
        raise ValueError("messages hold only a system message; add a user message")
    for i, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(
                f"message {i + first} has role {_short(role)} where {expected!r} must be; "
                "the order is system (optional, first only), user, assistant, user, ..."
            )


class Tokenizer:
    """A byte-level BPE with the special tokens <unk> 0, <s> 1, </s> 2 and v1's chat template.

    `fingerprint` is a sha256 over vocabulary, merges and special tokens: the same content has the same value,
    whatever its path or JSON layout. Can be pickled and copied.
    """

    unk_id, bos_id, eos_id = range(3)

    def __init__(self, tokenizer_json: str, directory: str | Path = "") -> None:
        """Takes the text of a tokenizer.json; `directory` says where it came from. Raises: ValueError."""
        self._json = tokenizer_json
        self.directory = Path(directory)
        vocab, special, self.fingerprint = _read(tokenizer_json)
        self.special_tokens, self.special_ids = tuple(special), tuple(special.values())
        self.vocab_size: int = len(vocab)
        try:
            self._backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the tokenizers library refuses it ({error})") from None
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True  # means: "<s>" in a text is encoded as plain characters

        characters = _byte_characters()
        self._bytes, self._bytes_and_names = [b""] * len(vocab), [b""] * len(vocab)
        for token, i in vocab.items():
            if token in special:
                self._bytes_and_names[i] = token.encode()
            else:
                self._bytes[i] = self._bytes_and_names[i] = bytes(characters[c] for c in token)
        self._user_start = [self.bos_id]
        self._line_end = self.encode("\n")
        self._assistant_start = [self.bos_id, *self.encode("assistant\n")]

    def __reduce__(self):
        # The library's own pickle forgets encode_special_tokens.
        return Tokenizer, (self._json, self.directory)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; never a special id. Half surrogate pairs become U+FFFD.

        Raises: ValueError if it is not a string.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text, as `encode` does, using all cores."""
        for text in texts:
            if not isinstance(text, str):  # the library would take a pair of strings for two texts in one
                raise ValueError(f"text must be a string, not {_short(text)}")
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # half a surrogate pair, which UTF-8 cannot express
            encodings = self._backend.encode_batch_fast([_repair(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`; never raises. Bytes that are not UTF-8 become U+FFFD.

        Special tokens are left out, or written by name if not `skip_special`; ids outside the vocabulary are
        left out.
        """
        table = self._bytes if skip_special else self._bytes_and_names
        return b"".join(table[i] for i in map(int, ids) if 0 <= i < len(table)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes of one token, perhaps a part of a character; b"" for a special token."""
        return self._bytes[token_id]

    def encode_document(self, text: str) -> list[int]:
        """Returns `<s>text</s>` as ids: one document for pretraining."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_chat(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation, as v1's template lays it out.

        After a last user turn comes the assistant's header, unless not `add_generation_prompt`.
        Raises: ValueError, see check_messages.
        """
        ids = self.encode_chat_batch([messages])[0].ids
        if messages[-1]["role"] == "user" and not add_generation_prompt:
            ids = ids[: -len(self._assistant_start)]
        return ids

    def encode_chat_with_mask(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """Returns (ids, mask) of a conversation; mask is 1 on answer tokens, see ChatTokens."""
        chat = self.encode_chat_batch([messages])[0]
        return chat.ids, chat.mask

    def encode_chat_batch(self, conversations: Sequence[Sequence[dict]]) -> list[ChatTokens]:
        """Returns every conversation as ChatTokens(ids, mask, turn_ends), using all cores.

        Give some thousand conversations a call: that keeps the cores busy and the memory small.
        Raises: ValueError naming the conversation's index, see check_messages.
        """
        layouts = []
        for i, messages in enumerate(conversations):
            try:
                check_messages(messages)
            except ValueError as error:
                where = f"conversation {i}: " if len(conversations) > 1 else ""
                raise ValueError(f"{where}{error}") from None
            layouts.append(self._layout(messages))
        texts = [piece for layout in layouts for piece, _, _ in layout if isinstance(piece, str)]
        encoded = iter(self.encode_batch(texts))
        chats = []
        for layout in layouts:
            chat = ChatTokens([], [], [])
            for piece, in_answer, ends_turn in layout:
                piece_ids = next(encoded) if isinstance(piece, str) else piece
                chat.ids.extend(piece_ids)
                chat.mask.extend([in_answer] * len(piece_ids))
                if ends_turn:
                    chat.turn_ends.append(len(chat.ids))
            chats.append(chat)
        return chats

    def render(self, messages: Sequence[dict]) -> str:
        """Returns the conversation as the template's text. For display: to encode it would not be safe."""
        check_messages(messages)
        pieces = [piece for piece, _, _ in self._layout(messages)]
        return "".join(p if isinstance(p, str) else self.decode(p, skip_special=False) for p in pieces)

    def _layout(self, messages: Sequence[dict]) -> list[tuple[str | list[int], int, bool]]:
        """Returns v1's template as pieces (text to encode or known ids, is answer, ends a turn).

        The answer is a piece of its own, so that training sees the ids that generation will produce.
        """
        pieces: list[tuple[str | list[int], int, bool]] = []
        end = [self.eos_id]
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                pieces += [(content, 0, False)]
            elif message["role"] == "user":
                pieces += [(self._user_start, 0, False), ("user\n" + content, 0, False)]
                pieces += [(end + self._line_end + self._assistant_start, 0, False)]
            else:
                pieces += [(content, 1, False), (end, 1, False), (self._line_end, 0, True)]
        return pieces


def _read(tokenizer_json: str) -> tuple[dict[str, int], dict[str, int], str]:
    """Returns (vocabulary, special tokens in order of id, fingerprint) of a tokenizer.json.

    Raises: ValueError for one that could encode text to a special id, lose text, or encode it to other ids
    than its fingerprint says.
    """
    try:
        data = json.loads(tokenizer_json)
        model, added = data["model"], data["added_tokens"]
        vocab = dict(model["vocab"])
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        special = dict(sorted(((t["content"], t["id"]) for t in added if t["special"]), key=lambda t: t[1]))
        results = {left + right for left, right in merges}
        vocab.update({t["content"]: t["id"] for t in added})
        in_order = sorted(vocab.values()) == list(range(len(vocab)))
    except RecursionError:
        raise ValueError("it is nested too deeply to be a tokenizer.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"it has not the form of a tokenizer.json ({reason})") from None

    for i, token in enumerate(SPECIAL_TOKENS):
        if special.get(token) != i:
            found = f"id {special[token]}" if token in special else "not a special token of it"
            raise ValueError(f"{token} must be the special token with id {i}, but is {found}")
    splitter = data.get("pre_tokenizer")
    splitter = {"use_regex": True} | splitter if isinstance(splitter, dict) else {}  # as the library reads it
    byte_level = splitter.get("type") == "ByteLevel" and splitter["use_regex"]
    if model.get("type", "BPE") != "BPE" or not byte_level or splitter.get("add_prefix_space", True):
        raise ValueError("it is not a byte-level BPE that adds no space before a text")
    others = ["normalizer"] if data.get("normalizer") else []
    settings = "dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"
    others += [name for name in settings if model.get(name)]
    if others:
        raise ValueError(f"it uses {', '.join(others)}, which a tokenizer of this toolkit may not")
    plain = [t["content"] for t in added if not t["special"]]
    if plain:
        raise ValueError(f"the added token {_short(plain[0])} is not marked special")
    characters = _byte_characters().keys()
    if not characters <= vocab.keys():
        raise ValueError(f"{len(characters - vocab.keys())} of the 256 bytes are missing from its vocabulary")
    odd = [t for t in vocab if t not in special and not set(t) <= characters]
    if odd:
        raise ValueError(f"the token {_short(odd[0])} is not written in byte characters")
    made = sorted(results & special.keys())
    if made:
        raise ValueError(f"a merge makes the special token {made[0]}, so text could become it")
    if not in_order:
        raise ValueError(f"its {len(vocab)} tokens do not have the ids 0 to {len(vocab) - 1}")

    content = [sorted(vocab, key=vocab.get), merges, special]
    return vocab, special, hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _byte_characters() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable Latin-1 bytes stand for themselves, the other 68 are written U+0100, U+0101, ...
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _repair(text: str) -> str:
    """Returns `text` with surrogate pairs joined and half ones as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
