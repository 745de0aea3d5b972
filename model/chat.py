"""Chatting with a model from Python, in the shape that users of Qwen and MiniMind know.

m = ChatModel.from_pretrained("out/full_sft_512.pth")
reply, history = m.chat("你好", history=[])
for text in m.stream("给我讲个故事", history): print(text)

Settings are keyword arguments: max_new_tokens, stop, and the fields of generate.Sampling.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from model.checkpoint import load_model
from model.engine import Engine, Request
from model.generate import FittedPrompt, Sampling, fit_messages, prepare
from model.hf import load_folder
from model.model import Transformer
from model.runtime import keep_freed_memory, pick_device, pick_dtype
from model.tokenizer import Tokenizer, check_messages, load_tokenizer
from model.tools import STOP, ToolParser, assemble, check_tools, flatten, open_reply

Query = str | list[dict]  # a question, or messages in OpenAI's form


class Progress(NamedTuple):
    """A reply so far."""

    text: str
    tokens: int
    seconds: float  # that the model took, not counting what the caller did in between
    finish_reason: str | None  # stop, length, cancelled; None: not finished


class ChatModel:
    """A model ready to chat. Many threads may use it at once: their questions are computed together."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, about: dict, summary: str = ""):
        self.engine, self.tokenizer, self.name, self.about, self.summary = engine, tokenizer, name, about, summary

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        lora: Sequence[str | Path] | None = None,
        tokenizer_dir: str | Path | None = None,
        n_heads: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 16,
        max_queue: int = 64,
        max_seq_len: int | None = None,
    ) -> "ChatModel":
        """The model of a .pth, or of a Hugging Face folder, on the best device there is.

        Args:
            lora: files of adapters trained on that .pth, to be merged in, in this order.
            n_heads: query heads of a .pth without .json.
            max_batch, max_queue: replies computed at once, and waiting for that, at most.
            max_seq_len: tokens of prompt and reply; None: what the model was trained on.
        Raises: ValueError, OSError as load_model and load_folder.
        """
        path, adapters = Path(path), [Path(file) for file in lora or []]
        where = pick_device(device)
        number_format, reason = pick_dtype(dtype, where)
        if where.type == "cpu":
            keep_freed_memory()
        if path.is_dir():
            if adapters:
                raise ValueError(f"{path} is a Hugging Face folder, adapters are for the .pth they were trained on")
            state, config, folder = load_folder(path)
            tokenizer, about = load_tokenizer(tokenizer_dir or folder), {}
            with torch.device("meta"):
                model = Transformer(config)
            model.load_state_dict(state, assign=True)
            model.output.weight = model.tok_embeddings.weight
        else:
            tokenizer = load_tokenizer(tokenizer_dir)
            model, about = load_model(path, tokenizer=tokenizer, n_heads=n_heads, adapters=adapters)
        summary = (
            f"{' + '.join(map(str, [path, *adapters]))}: {model.num_parameters() / 1e6:.1f}M parameters, "
            f"{where}, {str(number_format)[6:]} ({reason})"
        )
        model = prepare(model, where, number_format)
        engine = Engine(model, tokenizer, max_batch=max_batch, max_queue=max_queue, max_seq_len=max_seq_len)
        name = "+".join(file.stem if file.suffix == ".pth" else file.name for file in (path.resolve(), *adapters))
        return cls(engine, tokenizer, name, about, summary)

    def chat(
        self,
        query: Query,
        history: Sequence[tuple] | None = None,
        system: str | None = None,
        tools: list[dict] | None = None,
        **settings,
    ) -> tuple[str | dict, list[tuple]]:
        """The reply, and a new history that ends with (query, reply); `history` stays as it is.

        tools: functions in OpenAI's form. A reply that calls some is OpenAI's assistant message, a dict whose
        "tool_calls" say what to run; the next query is then the results:
        m.chat([{"role": "tool", "tool_call_id": ..., "content": ...}], history, tools=tools).
        Raises: ValueError for a setting out of range, QueueFull.
        """
        names = check_tools(tools)
        messages = flatten(conversation(query, history, system), tools)
        _, request = self.request(messages, **settings)
        if names:
            request = replace(request, stop=[*request.stop, *STOP])
        *_, last = self.follow(request)
        begun = open_reply(messages)
        reply = parse_tools(last.text, ToolParser(names, begun)) if names or begun else last.text
        return reply, [*(history or ()), (query, reply)]

    def stream(
        self, query: Query, history: Sequence[tuple] | None = None, system: str | None = None, **settings
    ) -> Iterator[str]:
        """Yields the reply so far, each time longer, at last what `chat` would return. Closing it stops the model."""
        _, request = self.request(flatten(conversation(query, history, system)), **settings)
        with closing(self.follow(request)) as progress:
            for step in progress:
                yield step.text

    def batch(self, queries: Sequence[Query], system: str | None = None, **settings) -> list[str]:
        """The replies to questions that have nothing to do with each other, computed together.

        Question i draws its random numbers from seed + i, so it gets what `chat` gives with that seed.
        """
        requests = []
        for i, query in enumerate(queries):
            _, request = self.request(flatten(conversation(query, None, system)), **settings)
            requests.append(replace(request, sampling=with_seed(request.sampling, i)))
        return [job.text for job in self.engine.run(requests)]

    def request(
        self, messages: list[dict], *, max_new_tokens: int = 256, stop: Sequence[str] = (), **sampling
    ) -> tuple[FittedPrompt, Request]:
        """What of the messages fits the context, and what the engine is to compute; roles as the tokenizer's."""
        prompt = self.fit(messages, max_new_tokens)
        return prompt, Request(prompt.ids, max_new_tokens, Sampling(**sampling), stop)

    def fit(self, messages: list[dict], max_new_tokens: int) -> FittedPrompt:
        """The prompt of a conversation; whole oldest turns are left out where they and the reply exceed the context.

        The reply gets the room it asks for, but no more than half the context. A last message of the assistant is
        one to be continued.
        Raises: ValueError for messages in another order, or a system message that leaves no room.
        """
        check_messages(messages)
        limit, begun = self.engine.max_seq_len, open_reply(messages)
        start = self.tokenizer.encode(begun)
        asked = messages[:-1] if begun else messages
        prompt = fit_messages(asked, self.tokenizer, limit - len(start), min(max_new_tokens, limit // 2))
        return prompt._replace(ids=prompt.ids + start)

    def follow(self, request: Request) -> Iterator[Progress]:
        """Yields how far the reply is, whenever there is new text, and at its end. Closing it stops the model."""
        text, seconds = "", 0.0
        with closing(self.engine.stream(request)) as updates:
            while True:
                started = time.perf_counter()
                update = next(updates)
                seconds += time.perf_counter() - started
                text += update.text
                if update.text or update.finish_reason:
                    yield Progress(text, update.completion_tokens, seconds, update.finish_reason)
                if update.finish_reason:
                    return


def conversation(query: Query, history: Sequence[tuple] | None = None, system: str | None = None) -> list[dict]:
    """Messages in OpenAI's form, from a history of (question, answer) pairs and a new question."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in history or ():
        if not isinstance(turn, (tuple, list)) or len(turn) != 2:
            raise ValueError(f"history is a list of (question, answer) pairs; {str(turn)[:60]!r} is none")
        question, answer = turn
        messages += [{"role": "user", "content": question}] if isinstance(question, str) else question
        messages += [{"role": "assistant", "content": answer} if isinstance(answer, str) else answer]
    return messages + ([{"role": "user", "content": query}] if isinstance(query, str) else list(query))


def with_seed(sampling: Sampling, offset: int) -> Sampling:
    """The same settings with other random numbers: seed + offset; without a seed they are random anyway."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + offset) % 2**63)


def parse_tools(text: str, parser: ToolParser) -> str | dict:
    """The text, or the assistant message in OpenAI's form if it calls tools."""
    content, calls = assemble([*parser.feed(text), *parser.finish()])
    return {"role": "assistant", "content": content or None, "tool_calls": calls} if calls else content
