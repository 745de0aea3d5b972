"""Many replies at once: requests join and leave a running batch at every token.

    engine = Engine(model, tokenizer)
    for update in engine.stream(Request(prompt_ids)): print(update.text, end="")
    jobs = engine.run([Request(ids) for ids in prompts])

A step is one forward pass over a single row of tokens: the newest token of every reply under way, and a chunk of the
prompts that are still being read, so that a long prompt holds nobody up. The matrix products see them all at once;
attention goes slot by slot. A slot is a place in the KV cache for one conversation. When a reply ends its slot keeps
what it holds, and the next prompt that begins the same way starts from there.

Source: Yu et al. 2022, "Orca" (batches that change at every step); Agrawal et al. 2024, "Sarathi-Serve" (chunks of
prompts beside replies).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.generate import Sampler, Sampling, TextStreamer, check_prompts
from model.model import Transformer, causal_mask, fused_attention
from model.tokenizer import Tokenizer

PREFILL_TOKENS = {"cpu": 128, "cuda": 2048, "mps": 512}  # of prompts in a step: enough to keep the processor busy
SHARED_TOKENS = 16  # a shared beginning shorter than this is computed again: copying it saves nothing
CACHE_BYTES = 4 << 30

# ---------------------------------------------------------------- 1. what is asked, and what comes of it


class QueueFull(RuntimeError):
    """As many requests wait as may; the caller should come again later."""


class ContextFull(ValueError):
    """The prompt leaves no room for a reply."""


class Constraint(Protocol):
    """What may come next in a reply, for example only what keeps it JSON."""

    def allowed(self) -> Tensor:
        """(V,) bool; the end token is among them where the reply may end."""

    def push(self, token_id: int) -> None:
        """Takes the token that was chosen."""


@dataclass
class Request:
    """One reply to be made; see Engine.check for what is refused."""

    prompt: Sequence[int]
    max_new_tokens: int = 256  # at most; a reply ends too where the context ends
    sampling: Sampling = Sampling()
    stop: Sequence[str] = ()
    logprobs: int | None = None  # None: none; k: of each token and of the k likeliest in its place
    constraint: Constraint | None = None
    embed: bool = False  # no reply: Job.embedding, the mean of the last hidden states, of length 1
    eos_id: int | None = Tokenizer.eos_id  # the token that ends a reply; None: none does


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities by the bare model: before temperature, penalties and constraint."""

    id: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens, best first


class Update(NamedTuple):
    """What a step brought to a job."""

    text: str  # new text; empty while a character or a stop string is incomplete
    logprobs: list[TokenLogprob]  # of the tokens whose text has come out, as far as not told before
    finish_reason: str | None  # None: it goes on; stop, length or cancelled
    completion_tokens: int  # of the reply so far


class Job:
    """A request under way, or done. Times are those of time.perf_counter, in seconds."""

    def __init__(self, request: Request, on_update: Callable[["Job", Update], None] | None, sampler: Sampler, streamer):
        self.request = request
        self.ids: list[int] = []  # without the end token; with the tokens of a stop string
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.embedding: list[float] | None = None
        self.finish_reason: str | None = None
        self.cached_tokens = 0  # of the prompt, which were in the KV cache already
        self.submitted_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.on_update, self.sampler, self.streamer = on_update, sampler, streamer
        self.slot: _Slot | None = None
        self.hidden_sum = 0.0  # (D,) of the tokens of an embedding
        self.begins = 0  # characters of the reply before the next token, with those held back
        self.held: deque[tuple[int, TokenLogprob]] = deque()  # not told yet, with where in the text the token begins

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)

    @property
    def todo(self) -> int:
        """Tokens of prompt and reply that are not in the cache yet: 1 while replying."""
        return self.prompt_tokens + len(self.ids) - len(self.slot.tokens)

    def next_tokens(self, count: int) -> list[int]:
        """The first `count` of these."""
        done = len(self.slot.tokens)
        return self.ids[-1:] if self.ids else list(self.request.prompt[done : done + count])

    def tell(self, text: str, finish_reason: str | None) -> None:
        """Adds to the reply and passes it on; log-probabilities go with the text of their tokens."""
        self.text += text
        self.finish_reason = finish_reason
        told = []
        whole = finish_reason == "length"  # the last token may be half a character
        while self.held and (whole or self.held[0][0] < len(self.text)):
            told.append(self.held.popleft()[1])
        self.logprobs += told
        if finish_reason:
            self.finished_at = time.perf_counter()
        if self.on_update and (text or told or finish_reason):
            self.on_update(self, Update(text, told, finish_reason, len(self.ids)))


# ---------------------------------------------------------------- 2. the KV cache


class _Slot:
    """A row of the cache: the tokens whose keys and values it holds."""

    def __init__(self, index: int):
        self.index, self.tokens, self.in_use, self.last_used = index, [], False, -1

    def shared(self, prompt: Sequence[int]) -> int:
        """How many tokens at the beginning are those of the prompt, whose last one must be computed anyway."""
        count = min(len(self.tokens), len(prompt) - 1)
        return next((i for i in range(count) if self.tokens[i] != prompt[i]), count)


class SlotCache:
    """Keys and values of all slots, preallocated; rows of different lengths, unlike KVCache.

    Shapes: k, v (layers, slots, K, max_len, C). Memory is taken from the system when a slot first grows into it.
    """

    def __init__(self, config, num_slots: int, max_len: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, num_slots, config.n_kv_heads, max_len, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.slots = [_Slot(index) for index in range(num_slots)]
        self.uses = 0

    @staticmethod
    def num_bytes(config, num_slots: int, max_len: int, dtype: torch.dtype) -> int:
        return 2 * config.n_layers * num_slots * config.n_kv_heads * max_len * config.head_dim * dtype.itemsize

    def take(self, prompt: Sequence[int], reuse: bool) -> _Slot:
        """A free slot, of which there must be one; with `reuse`, holding what any slot has of the prompt's beginning.

        Continuing a conversation takes over its slot. If only the beginning is shared, as a system message is,
        it is copied, and the slot that was not used for longest gives way.
        """
        free = [slot for slot in self.slots if not slot.in_use]
        best = max(self.slots, key=lambda slot: slot.shared(prompt))
        count = best.shared(prompt) if reuse else 0
        taken = min(free, key=lambda slot: slot.last_used)
        if count < SHARED_TOKENS:
            count = 0
        elif not best.in_use and 2 * count >= len(best.tokens):
            taken = best
        elif taken is not best:
            for x in (self.k, self.v):
                x[:, taken.index, :, :count] = x[:, best.index, :, :count]
        taken.tokens, taken.in_use = list(prompt[:count]), True
        return taken

    def release(self, slot: _Slot) -> None:
        self.uses += 1
        slot.in_use, slot.last_used = False, self.uses


class _Attention:
    """Attention of one step, given to Transformer.hidden_states: every token to the keys of its own slot.

    rows: (slot, tokens before, tokens now) in the order in which their tokens lie in the row. First those that
    reply, with one token each, by slot: neighbours are computed together, padded to the longest.
    """

    def __init__(self, cache: SlotCache, rows: list[tuple[int, int, int]]):
        self.cache = cache
        K, max_len, C = cache.k.shape[2:]
        device = cache.k.device
        slots = torch.tensor([slot for slot, _, now in rows for _ in range(now)])
        positions = torch.tensor([past + i for _, past, now in rows for i in range(now)])
        lines = ((slots[:, None] * K + torch.arange(K)) * max_len + positions[:, None]).flatten()
        self.lines = lines.to(device)  # (N * K,) where a token's keys go, in the cache as lines of C numbers
        self.positions = positions.to(device)[None]  # (1, N)

        self.replying: list[tuple[slice, slice, int, Tensor | None]] = []  # tokens, slots, keys, mask
        self.reading: list[tuple[slice, int, int, Tensor | None]] = []  # tokens, slot, keys, mask
        begin = 0
        while begin < len(rows) and rows[begin][2] == 1:
            end, lengths = begin, []
            while end < len(rows) and self.fits(rows[end], rows[begin], end - begin, lengths):
                lengths.append(rows[end][1] + 1)
                end += 1
            first, longest = rows[begin][0], max(lengths)
            mask = None
            if min(lengths) < longest:
                mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
                mask = mask[:, None, None]  # (n, 1, 1, S)
            self.replying.append((slice(begin, end), slice(first, first + end - begin), longest, mask))
            begin = end
        start = begin
        for slot, past, now in rows[begin:]:
            mask = causal_mask(now, past + now, device) if past else None
            self.reading.append((slice(start, start + now), slot, past + now, mask))
            start += now

    @staticmethod
    def fits(row: tuple[int, int, int], first: tuple[int, int, int], place: int, lengths: list[int]) -> bool:
        """True if the row's slot follows, and padding would not cost more than a call of its own."""
        slot, past, now = row
        longest, shortest = max([past, *lengths]), min([past, *lengths])
        return now == 1 and slot == first[0] + place and longest <= 2 * shortest + 64

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shapes: q (1, N, H, C), k and v (1, N, K, C); returns (1, N, H, C)."""
        keys, values = self.cache.k[layer], self.cache.v[layer]  # (slots, K, max_len, C)
        K, C = k.shape[2:]
        keys.view(-1, C).index_copy_(0, self.lines, k.reshape(-1, C))
        values.view(-1, C).index_copy_(0, self.lines, v.reshape(-1, C))
        parts = []
        for tokens, slots, length, mask in self.replying:
            grouped = q[0, tokens].unflatten(1, (K, -1))  # (n, K, G, C): the heads of a group are G queries of one
            seen = keys[slots, :, :length], values[slots, :, :length]
            parts.append(F.scaled_dot_product_attention(grouped, *seen, attn_mask=mask).flatten(1, 2))
        for tokens, slot, length, mask in self.reading:
            seen = keys[slot, None, :, :length], values[slot, None, :, :length]
            out = fused_attention(q[:, tokens].transpose(1, 2), *seen, None, mask)  # (1, H, T, C)
            parts.append(out[0].transpose(0, 1))
        return (torch.cat(parts) if len(parts) > 1 else parts[0])[None]


# ---------------------------------------------------------------- 3. the engine


@dataclass
class EngineStats:
    """Counters since the start."""

    requests: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0})
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the KV cache
    completion_tokens: int = 0
    steps: int = 0


class Engine:
    """Makes replies with one model, up to max_batch at a time; further requests wait in a queue.

    In float32 a request's tokens do not depend on the others. All methods may be called from any thread.

    Args:
        model: as generate.prepare returns it.
        max_batch: slots; each takes the memory of a whole context in the KV cache.
        max_queue: requests that may wait for a slot; one more raises QueueFull.
        max_seq_len: tokens of prompt and reply together (default: what the model was trained on).
        prefill_tokens: of prompts, that are read in a step beside the replies (default: by device).
        max_cache_bytes: limit of the KV cache.
    Raises: ValueError if the KV cache would be larger than that, or a number too small.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        max_seq_len: int | None = None,
        prefill_tokens: int | None = None,
        max_cache_bytes: int = CACHE_BYTES,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_queue = max_batch, max_queue
        self.max_seq_len = max_seq_len or model.config.max_seq_len
        for name, low in (("max_batch", 1), ("max_queue", 0), ("max_seq_len", 2), ("prefill_tokens", 1)):
            value = locals()[name]
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        weight = model.tok_embeddings.weight
        self.device = weight.device
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS[self.device.type]
        num_bytes = SlotCache.num_bytes(model.config, max_batch, self.max_seq_len, weight.dtype)
        if num_bytes > max_cache_bytes:
            raise ValueError(
                f"the KV cache of {max_batch} replies of {self.max_seq_len} tokens would take {num_bytes / 2**30:.1f} "
                f"GiB, more than {max_cache_bytes / 2**30:.1f}; lower max_batch (in 2-eval.py: --batch_size) or "
                "max_seq_len"
            )
        self.cache = SlotCache(model.config, max_batch, self.max_seq_len, weight.dtype, self.device)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # in the order they were admitted
        self.stats = EngineStats()
        self.lock = threading.RLock()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def check(self, request: Request) -> None:
        """Raises ValueError for what cannot be computed; ContextFull if the prompt is too long."""
        check_prompts([request.prompt], self.model.config.vocab_size)
        room = self.max_seq_len - len(request.prompt)
        if room < (0 if request.embed else 1):
            raise ContextFull(
                f"the prompt has {len(request.prompt)} tokens, too many for a context of {self.max_seq_len} tokens"
            )
        if request.max_new_tokens < 1 and not request.embed:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        if request.logprobs is not None and not 0 <= request.logprobs <= self.model.config.vocab_size:
            raise ValueError(f"logprobs is {request.logprobs}; it must be at least 0, or None for none")
        TextStreamer(self.tokenizer, request.stop)

    def submit(self, request: Request, on_update: Callable[[Job, Update], None] | None = None) -> Job:
        """Puts a request into the queue. Raises: ValueError as check, QueueFull.

        on_update is called with the job and the news of every step, by the thread that runs the step.
        """
        self.check(request)
        vocab_size = self.model.config.vocab_size
        sampler = Sampler(request.sampling, request.prompt, vocab_size, self.device, request.eos_id)
        job = Job(request, on_update, sampler, TextStreamer(self.tokenizer, request.stop))
        with self.lock:
            if len(self.waiting) >= self.max_queue + self.max_batch - len(self.running):
                raise QueueFull(f"{len(self.waiting)} requests are waiting already; try again later")
            self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job; its place is free at once. Does nothing if it has ended."""
        with self.lock:
            if job.finish_reason is None:
                self.finish(job, job.streamer.finish(), "cancelled")

    def cancel_all(self) -> None:
        """Ends all jobs and forgets what the cache holds, as after an error in a step."""
        with self.lock:
            for job in [*self.running, *self.waiting]:
                self.cancel(job)
            for slot in self.cache.slots:
                slot.tokens = []

    @torch.inference_mode()
    def step(self) -> bool:
        """One forward pass for all that is under way; False if there is nothing to do."""
        with self.lock:
            self.admit()
            if not self.running:
                return False
            replying = sorted((job for job in self.running if job.ids), key=lambda job: job.slot.index)
            work = [(job, 1) for job in replying]
            budget = self.prefill_tokens
            for job in self.running:
                if not job.ids and budget:
                    work.append((job, min(budget, job.todo)))
                    budget -= work[-1][1]
            hidden = self.forward(work)
            self.stats.steps += 1

            replies, last, end = [], [], 0  # jobs that get a token, and where their last token is
            for job, count in work:
                end += count
                if job.request.embed:
                    self.add_embedding(job, hidden[end - count : end])
                elif not job.todo:
                    replies.append(job)
                    last.append(end - 1)
            if replies:
                self.reply(replies, self.model.output(hidden[last] if len(last) < len(hidden) else hidden))
            return True

    def admit(self) -> None:
        """Gives free slots to those who wait, in their order."""
        while self.waiting and len(self.running) < self.max_batch:
            job = self.waiting.popleft()
            job.slot = self.cache.take(job.request.prompt, reuse=not job.request.embed)
            job.cached_tokens = len(job.slot.tokens)
            self.running.append(job)
            self.stats.prompt_tokens += job.prompt_tokens
            self.stats.cached_tokens += job.cached_tokens

    def forward(self, work: list[tuple[Job, int]]) -> Tensor:
        """The last hidden states (N, D) of the next tokens of some jobs, whose keys and values go into the cache."""
        tokens = [job.next_tokens(count) for job, count in work]
        attention = _Attention(self.cache, [(job.slot.index, len(job.slot.tokens), n) for job, n in work])
        ids = torch.tensor([[token for part in tokens for token in part]], device=self.device)
        hidden, _ = self.model.hidden_states(ids, positions=attention.positions, attend=attention)
        for (job, _), part in zip(work, tokens, strict=True):
            job.slot.tokens += part
        return self.model.norm(hidden[0])

    def add_embedding(self, job: Job, hidden: Tensor) -> None:
        job.hidden_sum = job.hidden_sum + hidden.float().sum(0)
        if not job.todo:
            job.embedding = F.normalize(job.hidden_sum, dim=0).tolist()
            self.finish(job, "", "stop")

    def reply(self, jobs: list[Job], logits: Tensor) -> None:
        """Chooses the next token of every job. Shapes: logits (B, V)."""
        allowed = [job.request.constraint and job.request.constraint.allowed() for job in jobs]
        tokens = Sampler.choose(logits, [job.sampler for job in jobs], allowed)
        self.stats.completion_tokens += len(jobs)
        now = time.perf_counter()
        for i, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            if job.finish_reason:  # cancelled by the news of a job before it
                continue
            request, streamer = job.request, job.streamer
            job.first_token_at = job.first_token_at or now
            if token == request.eos_id:
                self.finish(job, streamer.finish(), "stop")
                continue
            job.ids.append(token)
            if request.constraint:
                request.constraint.push(token)
            if request.logprobs is not None:
                job.held.append((job.begins, token_logprob(logits[i], token, request.logprobs)))
            text = streamer.push(token)
            job.begins = len(job.text) + len(text) + len(streamer.held)
            if streamer.stopped:
                self.finish(job, text, "stop")
            elif len(job.ids) >= min(request.max_new_tokens, self.max_seq_len - job.prompt_tokens):
                self.finish(job, text + streamer.finish(), "length")
            else:
                job.tell(text, None)

    def finish(self, job: Job, text: str, reason: str) -> None:
        if job.slot:
            self.running.remove(job)
            self.cache.release(job.slot)
        else:
            self.waiting.remove(job)
        self.stats.requests[reason] += 1
        job.tell(text, reason)

    def stream(self, request: Request) -> Iterator[Update]:
        """Yields the news of a request as they come; closing the iterator cancels it. Raises: as submit.

        Whoever waits for news drives the engine, for all: no thread is needed.
        """
        updates: deque[Update] = deque()
        job = self.submit(request, lambda job, update: updates.append(update))
        try:
            while not (updates and updates[0].finish_reason):
                if updates:
                    yield updates.popleft()
                elif self.lock.acquire(timeout=0.005):  # another thread may drive, and bring our news
                    try:
                        if not updates:
                            self.step()
                    finally:
                        self.lock.release()
            yield updates.popleft()
        finally:
            self.cancel(job)

    def run(self, requests: Sequence[Request]) -> list[Job]:
        """All requests, done; as many as there are, whatever the queue holds. Raises: ValueError as check."""
        jobs: list[Job] = []
        for request in requests:
            self.check(request)
        for request in requests:
            while True:
                try:
                    jobs.append(self.submit(request))
                    break
                except QueueFull:
                    self.step()
        while any(job.finish_reason is None for job in jobs):
            self.step()
        return jobs


def token_logprob(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    """Shapes: logits (V,)."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprob(token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))
