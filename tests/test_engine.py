"""The engine: replies that do not depend on the batch, joining and leaving, the cache's reuse, what is refused."""

import itertools
import random
import threading

import pytest
import torch

from model.engine import ContextFull, Engine, QueueFull, Request
from model.generate import Sampling, generate, prepare
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    """Random models whose next tokens depend on the whole context; vocabulary of the tokenizer."""
    made = {}
    for name, more in (("dense", {}), ("moe", dict(use_moe=True, n_routed_experts=4, num_experts_per_tok=2))):
        torch.manual_seed(1)
        config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, max_seq_len=128, **more)
        model = Transformer(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
        made[name] = prepare(model, CPU, torch.float32)
    return made


def prompts(count: int, seed: int = 0, lengths=(1, 40)) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *(rng.randrange(3, 6400) for _ in range(rng.randint(*lengths)))] for _ in range(count)]


def alone(model, request: Request) -> list[int]:
    """What the plain loop of generate.py makes of a request."""
    settings = vars(request.sampling) | {"stop": request.stop, "tokenizer": TOKENIZER, "eos_id": request.eos_id}
    room = model.config.max_seq_len - len(request.prompt)
    return generate(model, [request.prompt], max_new_tokens=min(request.max_new_tokens, room), **settings)[0].ids


def step_until(engine: Engine, done) -> int:
    """Steps taken until `done()`."""
    for count in itertools.count():
        if done():
            return count
        assert engine.step() and count < 1000


# ---------------------------------------------------------------- the batch does not matter


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_reply_is_the_same_alone_and_among_sixteen_others(models, kind):
    settings = [
        GREEDY,
        Sampling(temperature=1.5, top_k=50, seed=3),
        Sampling(temperature=1, top_k=0, top_p=0.9, seed=4),
    ]
    settings.append(Sampling(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.5, seed=5))
    requests = [
        Request(prompt, 5 + 3 * i, settings[i % 4], eos_id=None)
        for i, prompt in enumerate(prompts(17, lengths=(1, 60)))
    ]
    engine = Engine(models[kind], TOKENIZER, max_batch=17, prefill_tokens=16)
    together = [job.ids for job in engine.run(requests)]
    assert together == [alone(models[kind], request) for request in requests]
    assert [len(ids) for ids in together] == [5 + 3 * i for i in range(17)]
    single = Engine(models[kind], TOKENIZER, max_batch=1)
    assert together == [single.run([request])[0].ids for request in requests]


def test_requests_that_come_and_go_at_any_time_change_nothing(models):
    model = models["dense"]
    rng = random.Random(5)
    engine = Engine(model, TOKENIZER, max_batch=5, max_queue=100, prefill_tokens=7)
    jobs, cancelled = [], set()
    for i, prompt in enumerate(prompts(60, seed=9, lengths=(1, 90))):
        sampling = Sampling(temperature=1.0, top_k=20, seed=i) if i % 2 else GREEDY
        jobs.append(engine.submit(Request(prompt, rng.randint(1, 30), sampling, eos_id=None)))
        for _ in range(rng.randint(0, 6)):
            engine.step()
        if rng.random() < 0.4:
            job = rng.choice(jobs)
            if job.finish_reason is None:
                engine.cancel(job)
                cancelled.add(job)
                assert job.finish_reason == "cancelled"
    while engine.step():
        assert engine.num_running <= 5
    assert 5 < len(cancelled) < 40
    for job in jobs:
        expected = alone(model, job.request)
        assert job.ids == expected[: len(job.ids)] if job in cancelled else job.ids == expected
    assert engine.stats.requests == {"stop": 0, "length": 60 - len(cancelled), "cancelled": len(cancelled)}
    assert not any(slot.in_use for slot in engine.cache.slots)


def test_rows_of_very_different_lengths(models):
    """They are padded in groups; a row must never see another's keys or the padding."""
    lengths = [2, 3, 100, 4, 90, 95, 1, 1, 110, 2]
    requests = [Request([1, *range(100, 99 + length)], 12, GREEDY, eos_id=None) for i, length in enumerate(lengths)]
    engine = Engine(models["dense"], TOKENIZER, max_batch=10)
    assert [job.ids for job in engine.run(requests)] == [alone(models["dense"], request) for request in requests]


def test_a_long_prompt_does_not_stall_the_others(models):
    engine = Engine(models["dense"], TOKENIZER, max_batch=2, prefill_tokens=10)
    first = engine.submit(Request([1, 5], 50, GREEDY, eos_id=None))
    step_until(engine, lambda: first.ids)
    long = engine.submit(Request(prompts(1, lengths=(94, 94))[0], 3, GREEDY, eos_id=None))
    got = [len(first.ids)]
    for _ in range(9):  # 95 tokens, 10 a step
        engine.step()
        got.append(len(first.ids))
    assert got == list(range(got[0], got[0] + 10)) and not long.ids
    engine.step()
    assert len(long.ids) == 1
    while engine.step():
        pass
    assert long.ids == alone(models["dense"], long.request) and first.ids == alone(models["dense"], first.request)


# ---------------------------------------------------------------- what the cache keeps


def test_the_next_turn_of_a_conversation_is_not_read_again(models):
    engine = Engine(models["dense"], TOKENIZER, max_batch=3)
    (first,) = engine.run([Request(prompts(1, lengths=(30, 30))[0], 10, GREEDY, eos_id=None)])
    assert first.cached_tokens == 0
    engine.run([Request(prompts(1, seed=8)[0], 5, GREEDY)])  # another conversation in between
    second = Request([*first.request.prompt, *first.ids, 2, 201, 1, 320, 275, 201], 10, GREEDY, eos_id=None)
    (job,) = engine.run([second])
    assert job.cached_tokens == 40, "31 of the prompt and 9 of the reply; the last one was never an input"
    assert job.ids == alone(models["dense"], second)
    (again,) = engine.run([second])
    assert again.cached_tokens == len(second.prompt) - 1 and again.ids == job.ids


def test_a_shared_beginning_is_copied_even_from_a_running_reply(models):
    model, system = models["dense"], prompts(1, seed=3, lengths=(40, 40))[0]
    engine = Engine(model, TOKENIZER, max_batch=3)
    requests = [Request([*system, 1000 + i, 77], 20, GREEDY, eos_id=None) for i in range(3)]
    first = engine.submit(requests[0])
    step_until(engine, lambda: len(first.ids) == 5)
    others = engine.run(requests[1:])
    assert [job.cached_tokens for job in others] == [41, 41]
    while engine.step():
        pass
    assert [job.ids for job in (first, *others)] == [alone(model, request) for request in requests]


def test_the_slot_not_used_for_longest_gives_way(models):
    engine = Engine(models["dense"], TOKENIZER, max_batch=2)
    a, b, c = (Request(prompt, 2, GREEDY, eos_id=None) for prompt in prompts(3, lengths=(30, 30)))
    cached = [engine.run([request])[0].cached_tokens for request in (a, b, a, c, a, b)]
    assert cached == [0, 0, 30, 0, 30, 0]


# ---------------------------------------------------------------- text, stop strings, log-probabilities


def test_stop_strings_end_a_reply_and_never_come_out(models):
    (plain,) = Engine(models["dense"], TOKENIZER).run([Request([1, 5], 40, GREEDY, eos_id=None)])
    stop = plain.text[11:16]
    updates = []
    engine = Engine(models["dense"], TOKENIZER)
    engine.submit(Request([1, 5], 40, GREEDY, [stop], logprobs=0), lambda job, update: updates.append(update))
    while engine.step():
        pass
    text = "".join(update.text for update in updates)
    assert text == plain.text[: plain.text.index(stop)]
    assert [update.finish_reason for update in updates if update.finish_reason] == ["stop"]
    told = [logprob.id for update in updates for logprob in update.logprobs]
    assert told == plain.ids[: len(told)] and TOKENIZER.decode(told).startswith(text)
    assert len(TOKENIZER.decode(told[:-1])) < len(text), "no token beyond the text is told"


def test_end_token_and_its_absence(models):
    (plain,) = Engine(models["dense"], TOKENIZER).run([Request([1, 5], 20, GREEDY, eos_id=None)])
    end = plain.ids[7]
    (job,) = Engine(models["dense"], TOKENIZER).run([Request([1, 5], 20, GREEDY, eos_id=end)])
    assert (job.ids, job.finish_reason) == (plain.ids[: plain.ids.index(end)], "stop")
    assert (plain.finish_reason, plain.completion_tokens) == ("length", 20)


def test_logprobs_are_those_of_the_bare_model(models):
    model = models["dense"]
    sampling = Sampling(temperature=1.7, top_k=5, repetition_penalty=1.5, seed=2)
    (job,) = Engine(model, TOKENIZER).run([Request([1, 5, 9], 8, sampling, logprobs=3, eos_id=None)])
    ids = torch.tensor([[1, 5, 9, *job.ids]])
    expected = model(ids)[0][0, 2:-1].log_softmax(-1)
    assert [logprob.id for logprob in job.logprobs] == job.ids
    got = torch.tensor([logprob.logprob for logprob in job.logprobs])
    torch.testing.assert_close(got, expected.gather(1, torch.tensor(job.ids)[:, None])[:, 0], atol=1e-4, rtol=1e-4)
    best = expected.topk(3)
    assert [[token for token, _ in logprob.top] for logprob in job.logprobs] == best.indices.tolist()
    top = torch.tensor([[value for _, value in logprob.top] for logprob in job.logprobs])
    torch.testing.assert_close(top, best.values, atol=1e-4, rtol=1e-4)


class OnlyThese:
    """A constraint: one of two tokens at even places, the end token at the fourth."""

    def __init__(self):
        self.taken = []

    def allowed(self):
        mask = torch.zeros(6400, dtype=torch.bool)
        mask[[2] if len(self.taken) == 4 else [70, 71] if len(self.taken) % 2 == 0 else [80]] = True
        return mask

    def push(self, token_id):
        self.taken.append(token_id)


def test_a_constraint_limits_what_may_come(models):
    constraint = OnlyThese()
    requests = [Request([1, 5], 9, GREEDY, constraint=constraint), Request([1, 5], 9, GREEDY, eos_id=None)]
    limited, free = Engine(models["dense"], TOKENIZER).run(requests)
    assert limited.ids == constraint.taken and limited.finish_reason == "stop"
    assert limited.ids[0] in (70, 71) and limited.ids[1::2] == [80, 80]
    assert free.ids == alone(models["dense"], requests[1])


def test_embeddings(models):
    model, texts = models["dense"], prompts(6, seed=4, lengths=(1, 120))
    engine = Engine(model, TOKENIZER, max_batch=3, prefill_tokens=16)
    reply = Request(prompts(1)[0], 30, GREEDY, eos_id=None)
    *jobs, other = engine.run([*(Request(text, embed=True) for text in texts), reply])
    for text, job in zip(texts, jobs, strict=True):
        hidden, _ = model.hidden_states(torch.tensor([text]))
        mean = model.norm(hidden)[0].mean(0)
        torch.testing.assert_close(torch.tensor(job.embedding), mean / mean.norm(), atol=1e-5, rtol=1e-4)
        assert job.completion_tokens == 0
    assert other.ids == alone(model, reply)


# ---------------------------------------------------------------- what is refused, what is cancelled


def test_the_context_ends_a_reply(models):
    engine = Engine(models["dense"], TOKENIZER, max_seq_len=20)
    job, full = engine.run([Request([1] * 15, 100, GREEDY, eos_id=None), Request([1] * 19, 100, GREEDY, eos_id=None)])
    assert (len(job.ids), job.finish_reason, len(full.ids)) == (5, "length", 1)
    with pytest.raises(ContextFull, match="20 tokens, too many for a context of 20"):
        engine.submit(Request([1] * 20))
    assert engine.submit(Request([1] * 20, embed=True))


def test_wrong_requests_are_refused_at_once(models):
    engine = Engine(models["dense"], TOKENIZER)
    for request, message in (
        (Request([]), "prompt 0 is empty"),
        (Request([6400]), "token 6400"),
        (Request([1], 0), "max_new_tokens is 0"),
        (Request([1], stop="text"), "stop must be a list"),
        (Request([1], stop=[""]), "not empty"),
        (Request([1], logprobs=-1), "logprobs is -1"),
        (Request([1], sampling=Sampling(logit_bias={7000: 1})), "token 7000"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(request)
    assert not engine.busy and not engine.step()
    with pytest.raises(ValueError, match="KV cache of 16 replies of 128 tokens would take .*lower max_batch"):
        Engine(models["dense"], TOKENIZER, max_cache_bytes=1000)


def test_the_queue_is_bounded_and_keeps_its_order(models):
    engine = Engine(models["dense"], TOKENIZER, max_batch=2, max_queue=3)
    ended = []
    requests = [Request(prompt, 4, GREEDY, eos_id=None) for prompt in prompts(5)]
    for request in requests:
        engine.submit(request, lambda job, update: update.finish_reason and ended.append(job.request))
    with pytest.raises(QueueFull, match="5 requests are waiting"):
        engine.submit(requests[0])
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 3)
    with pytest.raises(QueueFull):
        engine.submit(requests[0])
    while engine.step():
        pass
    assert [requests.index(request) for request in ended] == [0, 1, 2, 3, 4]
    assert len(engine.run([requests[0]] * 12)) == 12, "run waits for room"


def test_cancelling_frees_the_slot_for_the_next_step(models):
    engine = Engine(models["dense"], TOKENIZER, max_batch=1)
    updates = []
    first = engine.submit(Request([1, 5], 50, GREEDY, eos_id=None), lambda job, update: updates.append(update))
    waiting = engine.submit(Request([1, 6], 50, GREEDY, eos_id=None))
    last = engine.submit(Request([1, 7], 3, GREEDY, eos_id=None))
    step_until(engine, lambda: len(first.ids) == 3)
    engine.cancel(waiting)
    engine.cancel(first)
    engine.cancel(first)
    assert [update.finish_reason for update in updates][-1] == "cancelled" and len(first.ids) == 3
    engine.step()
    assert len(last.ids) == 1 and not waiting.ids
    assert engine.stats.requests["cancelled"] == 2


def test_news_may_cancel_other_jobs(models):
    engine = Engine(models["dense"], TOKENIZER)
    jobs = []
    request = Request([1, 5], 50, GREEDY, eos_id=None)
    jobs.append(engine.submit(request, lambda job, update: len(job.ids) > 3 and engine.cancel(jobs[1])))
    jobs.append(engine.submit(request))
    while engine.step():
        pass
    assert [job.finish_reason for job in jobs] == ["length", "cancelled"]
    assert 3 <= len(jobs[1].ids) < 50 and engine.num_running == 0


def test_after_a_failed_step_the_engine_can_go_on(models, monkeypatch):
    model = models["dense"]
    engine = Engine(model, TOKENIZER, max_batch=2)
    request = Request(prompts(1, lengths=(30, 30))[0], 10, GREEDY, eos_id=None)
    job = engine.submit(request)
    step_until(engine, lambda: len(job.ids) == 2)
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden_states", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.cancel_all()
    assert job.finish_reason == "cancelled" and not engine.busy
    (again,) = engine.run([request])
    assert again.cached_tokens == 0 and again.ids == alone(model, request)


# ---------------------------------------------------------------- streams and threads


def test_stream_gives_the_text_in_pieces_and_closing_it_cancels(models):
    engine = Engine(models["dense"], TOKENIZER)
    request = Request([1, 5], 20, GREEDY, eos_id=None)
    updates = list(engine.stream(request))
    assert "".join(update.text for update in updates) == engine.run([request])[0].text
    assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
    assert updates[-1].finish_reason == "length"
    stream = engine.stream(request)
    next(stream)
    assert engine.num_running == 1
    stream.close()
    assert engine.num_running == 0 and engine.stats.requests["cancelled"] == 1


def test_threads_share_an_engine(models):
    engine = Engine(models["dense"], TOKENIZER, max_batch=3)
    requests = [Request(prompt, 25, Sampling(temperature=1.0, seed=i)) for i, prompt in enumerate(prompts(8))]
    texts: dict[int, str] = {}

    def use(i: int) -> None:
        texts[i] = "".join(update.text for update in engine.stream(requests[i]))

    threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    single = Engine(models["dense"], TOKENIZER, max_batch=1)
    assert texts == {i: single.run([request])[0].text for i, request in enumerate(requests)}
