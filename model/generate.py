"""Generating text: the next token, a batch of replies with a KV cache, text as it comes, prompts that fit.

replies = generate(model, [tokenizer.encode_chat(messages)], tokenizer=tokenizer, temperature=0)
for piece in stream(model, [ids], tokenizer=tokenizer): print(piece.text, end="")
"""

import argparse
import codecs
import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.model import Attention, FeedForward, KVCache, RMSNorm, Transformer
from model.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # prompt tokens of one forward pass; bounds the memory that a long prompt takes
NUCLEUS_GUESS = 256  # tokens that are enough for most nuclei; sorting all 6400 would cost as much as the model

# ---------------------------------------------------------------- 1. the next token


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one reply are chosen. Raises: ValueError naming a value out of its range.

    They work in this order: logit_bias, the penalties, temperature, top_k, top_p, min_p. The defaults are v1's.
    Source of presence and frequency penalty: OpenAI's API reference; they look at the reply only.
    """

    temperature: float = 0.7  # below 1: likely tokens become likelier; 0: always the likeliest
    top_k: int = 8  # only the k likeliest tokens; 0: no limit
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the reply become less likely
    seed: int | None = None  # same seed, same reply; None: another one each time
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the reply holds
    frequency_penalty: float = 0.0  # subtracted as often as the reply holds the token
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id: what is added to its logit

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0, float("inf")),
            "top_k": (0, float("inf")),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
            "seed": (0, 2**63 - 1),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            whole = name in ("top_k", "seed")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number")
            if not low <= value <= high or value == float("inf"):
                raise ValueError(f"{name} is {value}; it must be " + describe_range(low, high))
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0 or type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias holds {token!r}: {bias!r}; it maps token ids to numbers from -100 to 100")

    @property
    def filters(self) -> tuple[float, int, float, float]:
        """Rows that have these in common are computed together."""
        return self.temperature, self.top_k, self.top_p, self.min_p


def describe_range(low: float, high: float) -> str:
    return f"at least {low}" if high == float("inf") else f"between {low} and {high}"


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of Sampling but the seed, with its default. Sampling(...) checks the values."""
    helps = {
        "temperature": "below 1: likely tokens become likelier; 0: always the likeliest",
        "top_k": "draw from the k likeliest tokens; 0: from all",
        "top_p": "draw from the likeliest tokens that reach this probability together",
        "min_p": "draw from tokens at least this share as likely as the likeliest",
        "repetition_penalty": "above 1: tokens that were there before become less likely",
    }
    for field_ in fields(Sampling):
        if field_.name in helps:
            text = f"{helps[field_.name]} (default: {field_.default})"
            parser.add_argument(f"--{field_.name}", type=type(field_.default), default=field_.default, help=text)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with those of seen tokens made smaller: divided by the penalty above 0, multiplied by it below.

    Shapes: logits (B, V), seen (B, V) bool. Source: Keskar et al. 2019, "CTRL", section 4.1, mended for
    negative logits, which dividing would make likelier.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(
    logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The probabilities (B, V), float32, that the next token is drawn from; temperature above 0.

    Tokens exactly as likely as the last one kept are kept too.
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top_p); Nguyen et al. 2024,
    "Turning Up the Heat: Min-p Sampling".
    """
    V = logits.shape[-1]
    logits = logits.float() / temperature
    if 0 < top_k < V:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1:
        for size in (min(top_k or NUCLEUS_GUESS, V), V):
            ordered = probs.topk(size).values
            before = ordered.cumsum(-1) - ordered  # what the likelier tokens have together
            if (before[:, -1] >= top_p).all():
                break
        least = ordered.masked_fill(before >= top_p, 1).amin(-1, keepdim=True).minimum(ordered[:, :1])
        probs = probs.masked_fill(probs < least, 0)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the cumulative probability passes the random number; uniform (B, 1) in [0, 1)."""
    cumulative = probs.cumsum(-1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1)


class Sampler:
    """Chooses the tokens of one reply: its settings, its random numbers and its memory of tokens seen.

    Random numbers are drawn on the CPU: a seed means the same on every device. Sampler.choose does it for the
    rows of a batch; what a row gets does not depend on the rows beside it.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, device, eos_id: int | None):
        self.sampling, self.eos_id = sampling, eos_id
        self.generator = torch.Generator()
        self.generator.manual_seed(random.getrandbits(62) if sampling.seed is None else sampling.seed)
        self.seen = self.counts = self.bias = None  # (V,) each, where the settings need it
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        if sampling.logit_bias:
            ids = list(sampling.logit_bias)
            if max(ids) >= vocab_size:
                raise ValueError(f"logit_bias holds token {max(ids)}; the model knows 0 to {vocab_size - 1}")
            self.bias = torch.zeros(vocab_size, device=device)
            self.bias[ids] = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float, device=device)

    @property
    def adjusts(self) -> bool:
        return self.seen is not None or self.counts is not None or self.bias is not None

    def adjust(self, logits: Tensor) -> Tensor:
        """The logits (V,) with bias and penalties."""
        if self.bias is not None:
            logits = logits + self.bias
        if self.seen is not None:
            penalized = penalize_repetition(logits, self.seen, self.sampling.repetition_penalty)
            if self.eos_id is not None:  # every chat prompt holds it, and a reply must be able to end
                penalized[self.eos_id] = logits[self.eos_id]
            logits = penalized
        if self.counts is not None:
            logits = logits - self.sampling.frequency_penalty * self.counts
            logits = logits - self.sampling.presence_penalty * (self.counts > 0)
        return logits

    def remember(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1

    @staticmethod
    def choose(logits: Tensor, rows: Sequence["Sampler"], allowed: Sequence[Tensor | None] = ()) -> list[int]:
        """The next token of every row; `allowed` limits the choice of a row to the tokens that are True in it.

        Shapes: logits (B, V), allowed (V,) bool each.
        """
        logits = logits.float()
        changed = [i for i, row in enumerate(rows) if row.adjusts]
        limited = [i for i, mask in enumerate(allowed) if mask is not None]
        if changed or limited:
            logits = logits.clone()
        for i in changed:
            logits[i] = rows[i].adjust(logits[i])
        for i in limited:
            logits[i] = logits[i].masked_fill(~allowed[i].to(logits.device), float("-inf"))
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.sampling.filters, []).append(i)
        ids = [0] * len(rows)
        for filters, members in groups.items():
            part = logits if len(groups) == 1 else logits[members]
            for i, token in zip(members, draw_tokens(part, [rows[i] for i in members], *filters), strict=True):
                ids[i] = token
        for row, token in zip(rows, ids, strict=True):
            row.remember(token)
        return ids


def draw_tokens(logits: Tensor, rows: Sequence[Sampler], temperature, top_k, top_p, min_p) -> list[int]:
    """A token for every row of logits (B, V), float32, all with the same filters."""
    if temperature < 1e-5:  # too near to 0 to divide by
        return logits.argmax(-1).tolist()
    ids = None
    if 0 < top_k < logits.shape[-1]:  # work on the k likeliest, in the order of their ids, as it would be on all
        likeliest = logits.topk(top_k + 1)
        if (likeliest.values[:, -1] < likeliest.values[:, -2]).all():  # not where several are equally likely
            ids = likeliest.indices[:, :-1].sort(-1).values
            logits = logits.gather(1, ids)
    uniform = torch.cat([torch.rand(1, 1, generator=row.generator) for row in rows]).to(logits.device)
    places = draw(distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), uniform)
    return (places if ids is None else ids.gather(1, places[:, None])[:, 0]).tolist()


# ---------------------------------------------------------------- 2. text as it comes


class TextStreamer:
    """Turns token ids into text one by one, in constant time each.

    Text is held back while it is half a character, or while it may be the beginning of a stop string. Half a
    character at the very end is never given out. `stopped` turns True when a stop string is complete; neither
    it nor what follows it is given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be a list of strings that are not empty, not {stop!r}")
        self.tokenizer, self.stop, self.stopped = tokenizer, list(stop), False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        text = self.held + self.decoder.decode(self.tokenizer.token_bytes(token_id))
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped = True
            text, self.held = text[: min(found)], ""
            return text
        beginnings = (n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n]))
        end = len(text) - max(beginnings, default=0)
        text, self.held = text[:end], text[end:]
        return text

    def finish(self) -> str:
        """The text held back that turned out to be no stop string; to call after the last token."""
        text, self.held = self.held, ""
        return text


# ---------------------------------------------------------------- 3. a batch of replies


@dataclass
class Reply:
    """What the model said to one prompt."""

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)  # without the end token; with the tokens of a stop string
    text: str = ""  # without the stop string; empty if no tokenizer was given
    finish_reason: str | None = None  # stop: the end token or a stop string; length: max_new_tokens; None: not yet

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)


class Piece(NamedTuple):
    """One step of one row."""

    row: int
    text: str  # new text; empty while a character or a stop string is incomplete
    reply: Reply  # of this row so far; its finish_reason is set on its last piece


@torch.inference_mode()
def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 512,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    eos_id: int | None = Tokenizer.eos_id,
    **sampling,
) -> Iterator[Piece]:
    """Yields a Piece for every new token of every prompt, as soon as it is there.

    Prompts may differ in length. In float32 a row gets what it would get alone: row i draws its random
    numbers from seed + i. A row that is finished leaves the batch.

    Args:
        max_new_tokens: at most so many tokens a reply; one number, or one for each row. Any length is computed,
            but a model is good only up to config.max_seq_len tokens in all; fit_messages makes room.
        tokenizer: needed for text and stop strings.
        eos_id: the token that ends a reply; None: none does.
        sampling: the fields of Sampling.
    Raises: ValueError for a value out of range, an empty prompt, an unknown token.
    """
    settings = Sampling(**sampling)
    check_prompts(prompts, model.config.vocab_size)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts) or min(limits) < 1:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}; it must be at least 1, one number or one for each prompt"
        )
    if stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
    if model.training and model.config.dropout:
        raise ValueError("the model is in training mode, with dropout; call model.eval() first")

    seeds = [None if settings.seed is None else (settings.seed + i) % 2**63 for i in range(len(prompts))]
    rows = [Sampling(**{**sampling, "seed": seed}) for seed in seeds]
    device = next(model.parameters()).device
    vocab_size = model.config.vocab_size
    samplers = [Sampler(row, prompt, vocab_size, device, eos_id) for row, prompt in zip(rows, prompts, strict=True)]
    streamers = [tokenizer and TextStreamer(tokenizer, stop) for _ in prompts]
    replies = [Reply(len(prompt)) for prompt in prompts]

    running = list(range(len(prompts)))  # rows of the batch, by their number
    logits, cache = prefill(model, prompts, max(limits) - 1)
    while True:
        next_ids = Sampler.choose(logits, samplers)
        unfinished = []
        for place, (row, token) in enumerate(zip(running, next_ids, strict=True)):
            reply, streamer, text = replies[row], streamers[row], ""
            if token == eos_id:
                reply.finish_reason = "stop"
            else:
                reply.ids.append(token)
                if streamer:
                    text = streamer.push(token)
                if streamer and streamer.stopped:
                    reply.finish_reason = "stop"
                elif len(reply.ids) == limits[row]:
                    reply.finish_reason = "length"
                else:
                    unfinished.append(place)
            if streamer and reply.finish_reason:
                text += streamer.finish()
            reply.text += text
            yield Piece(row, text, reply)
        if not unfinished:
            return
        if len(unfinished) < len(running):
            running = [running[place] for place in unfinished]
            next_ids = [next_ids[place] for place in unfinished]
            samplers = [samplers[place] for place in unfinished]
            cache.select(torch.tensor(unfinished, device=device))
        logits, _ = model(torch.tensor(next_ids, device=device)[:, None], cache=cache)
        logits = logits[:, 0]


def generate(model: Transformer, prompts: Sequence[Sequence[int]], **settings) -> list[Reply]:
    """The replies to a batch of prompts, in their order; arguments as of `stream`."""
    replies = {piece.row: piece.reply for piece in stream(model, prompts, **settings)}
    return [replies[row] for row in range(len(prompts))]


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ValueError for an empty prompt, or an id that the model has no embedding for."""
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; it must hold at least the token <s>")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt {i} holds token {max(prompt)}; the model knows 0 to {vocab_size - 1}")


def prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], room: int, chunk: int = PREFILL_CHUNK
) -> tuple[Tensor, KVCache]:
    """Logits (B, V) after the last token of every prompt, and a cache of them with room for more tokens.

    Shorter prompts are padded on the left, so that all end in the same column.
    """
    parameter = next(model.parameters())
    device = parameter.device
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    real = torch.tensor([[False] * (T - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device)
    padded = not real.all()
    cache = KVCache(model.config, len(prompts), T + room, parameter.dtype, device)
    for start in range(0, T, chunk):
        part = ids[:, start : start + chunk]
        last = torch.zeros_like(part, dtype=torch.bool)
        last[:, -1] = True
        mask = real[:, : start + chunk] if padded else None
        logits, _ = model(part, attention_mask=mask, cache=cache, select=last)
    return logits, cache


# ---------------------------------------------------------------- 4. prompts that fit the context


class FittedPrompt(NamedTuple):
    """A prompt within the limit, and what was left out for that."""

    ids: list[int]
    dropped_turns: int = 0  # oldest question-and-answer pairs
    cut_tokens: int = 0  # from the beginning of the newest question, or of the text

    @property
    def note(self) -> str:
        """What was left out, for the user; empty if nothing."""
        turns = f"the oldest {self.dropped_turns} turn(s) were left out" if self.dropped_turns else ""
        cut = f"the first {self.cut_tokens} tokens of the text were cut off" if self.cut_tokens else ""
        parts = " and ".join(filter(None, (turns, cut)))
        return f"too long for the context: {parts}" if parts else ""


def fit_messages(messages: Sequence[dict], tokenizer: Tokenizer, limit_tokens: int, reserve: int) -> FittedPrompt:
    """The prompt of a chat, at most limit_tokens - reserve long: `reserve` is for the reply.

    Whole oldest turns are left out; the system message and the newest question stay. A question that is too
    long by itself loses tokens at its beginning, between the markers.
    Raises: ValueError if the last message is not the user's, or the system message alone leaves no room.
    """
    chat = tokenizer.encode_chat_batch([messages])[0]
    if messages[-1]["role"] != "user":
        raise ValueError("the last message must be the user's, for the model to answer")
    budget = limit_tokens - reserve
    has_system = messages[0]["role"] == "system"
    system = tokenizer.encode(messages[0]["content"]) if has_system else []
    ends = [len(system), *chat.turn_ends]  # the conversation may begin at any of these
    for dropped, end in enumerate(ends):
        ids = system + chat.ids[end:]
        if len(ids) <= budget:
            return FittedPrompt(ids, dropped)

    content = tokenizer.encode(messages[-1]["content"])
    keep = len(content) - (len(ids) - budget)
    while keep > 0:  # text encoded anew may have a token more, so this may take a second turn
        newest = tokenizer.decode(content[-keep:]).lstrip("\ufffd")  # not the second half of a character
        shorter = [*messages[: int(has_system)], {"role": "user", "content": newest}]
        ids = tokenizer.encode_chat(shorter)
        if len(ids) <= budget:
            return FittedPrompt(ids, dropped, len(content) - keep)
        keep -= len(ids) - budget
    raise ValueError(
        f"a context of {limit_tokens} tokens, {reserve} of them for the reply, has no room for a question"
        + (f" beside a system message of {len(system)} tokens; shorten it" if system else "; raise the limit")
    )


def fit_prompt(text: str, tokenizer: Tokenizer, limit_tokens: int, reserve: int) -> FittedPrompt:
    """<s> and the text to continue, at most limit_tokens - reserve long: the end of a text that is longer."""
    ids = tokenizer.encode(text)
    budget = limit_tokens - reserve - 1
    if budget < 1:
        raise ValueError(f"a context of {limit_tokens} tokens, {reserve} of them for the reply, has no room for a text")
    cut = max(0, len(ids) - budget)
    return FittedPrompt([tokenizer.bos_id, *ids[cut:]], cut_tokens=cut)


# ---------------------------------------------------------------- 5. a model ready to generate


def in_few_sizes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), which works row by row, called with 1, 2, 4, 8, 16, 32, 48, ... rows: zeros are added and cut off.

    For every number of rows oneDNN compiles and keeps a program and a buffer, up to a megabyte for each matrix.
    """
    num_rows = x.numel() // x.shape[-1]
    wanted = 1 << (num_rows - 1).bit_length() if num_rows <= 16 else -(-num_rows // 16) * 16
    if wanted == num_rows or not num_rows:
        return function(x)
    out = function(F.pad(x.reshape(num_rows, -1), (0, 0, 0, wanted - num_rows)))
    return out[:num_rows].view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """x W^T with W stored in the blocks that oneDNN's kernels read, without autograd.

    With one row of x the plain layout reaches a half to a third of the speed, in float32 on one core only.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return in_few_sizes(self.multiply, x)

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class HalfLinear(nn.Module):
    """x W^T with W stored in float16, x and the products in float32, by FBGEMM: half the memory to read."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.weight)


class PackedAttention(Attention):
    """Attention with packed weights, those of queries, keys and values in one matrix."""

    def __init__(self, plain: Attention, linear: type[nn.Module]):
        nn.Module.__init__(self)
        self.config = plain.config
        self.wqkv = linear(torch.cat([plain.wq.weight, plain.wk.weight, plain.wv.weight]))
        self.wo = linear(plain.wo.weight)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As Attention.project; a pair of channels turns as one complex number, in fewer operations."""
        H, K, C = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        turned, v = self.wqkv(x).unflatten(-1, (-1, C)).split((H + K, K), 2)
        pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2))) * torch.complex(*rotary)
        q, k = torch.view_as_real(pairs).flatten(-2).type_as(x).split((H, K), 2)
        return q, k, v


class PackedFeedForward(nn.Module):
    """FeedForward with packed weights; silu and the product happen inside the matrix products."""

    def __init__(self, plain: FeedForward):
        super().__init__()
        self.w1, self.w2, self.w3 = (PackedLinear(w.weight).weight for w in (plain.w1, plain.w2, plain.w3))

    def forward(self, x: Tensor) -> Tensor:
        return in_few_sizes(self.multiply, x)

    def multiply(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        gate = linear(x, self.w1, None, "swish", [], "")
        return linear(linear(x, gate, self.w3, None, "mul"), self.w2, None, "none", [], "")


class FusedNorm(nn.Module):
    """RMSNorm in float32, in one call."""

    def __init__(self, plain: RMSNorm):
        super().__init__()
        self.weight, self.eps = plain.weight, plain.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True where the packed kernels exist: x86 CPUs with oneDNN, or FBGEMM for float16; bfloat16 needs AVX-512."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if dtype == torch.float16:
        return "fbgemm" in torch.backends.quantized.supported_engines
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepare(model: Transformer, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """The model itself, moved, in eval mode and made fast for generating; it can no longer be trained or saved.

    float16 on an x86 CPU is the format of the weights only: it has no float16 arithmetic.
    """
    device = torch.device(device)
    half = dtype == torch.float16 and can_pack(device, dtype)
    model.to(device, torch.float32 if half else dtype).eval().requires_grad_(False)
    if can_pack(device, dtype):
        pack(model, HalfLinear if half else PackedLinear)
    return model


def pack(module: nn.Module, linear: type[nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, FeedForward) and linear is PackedLinear:
            setattr(module, name, PackedFeedForward(child))
        elif isinstance(child, Attention):
            setattr(module, name, PackedAttention(child, linear))
        elif isinstance(child, nn.Linear):
            setattr(module, name, linear(child.weight))
        elif isinstance(child, RMSNorm) and child.weight.dtype == torch.float32:
            setattr(module, name, FusedNorm(child))
        elif isinstance(child, nn.Dropout):
            setattr(module, name, nn.Identity())
        else:
            pack(child, linear)
