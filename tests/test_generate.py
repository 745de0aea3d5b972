"""Generation: sampling against hand-computed distributions, batches against single prompts, text streaming."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.generate import (
    PackedFeedForward,
    PackedLinear,
    Sampler,
    Sampling,
    TextStreamer,
    can_pack,
    distribution,
    draw,
    fit_messages,
    fit_prompt,
    generate,
    penalize_repetition,
    prefill,
    prepare,
    stream,
)
from model.LMConfig import LMConfig
from model.model import KVCache, Transformer
from model.tokenizer import load_tokenizer

PROMPTS = [[1, 5, 9, 7], [1], [1, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [1, 8, 8, 8, 8, 8]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(params=["dense", "moe"])
def model(request, tiny_model):
    return tiny_model(use_moe=request.param == "moe")


def plain_greedy(model, prompt: list[int], count: int) -> list[int]:
    """The slow way: the whole text through the model for every token, no cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return ids[len(prompt) :]


def ids_of(replies) -> list[list[int]]:
    return [reply.ids for reply in replies]


# ---------------------------------------------------------------- batches and the cache


def test_greedy_equals_a_loop_without_cache(model):
    expected = [plain_greedy(model, prompt, 20) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == len(PROMPTS), "prompts that give one reply would prove nothing"
    assert ids_of(generate(model, PROMPTS, max_new_tokens=20, temperature=0, eos_id=None)) == expected


def test_unequal_prompts_in_a_batch_give_what_each_gives_alone(model):
    batch = generate(model, PROMPTS, max_new_tokens=20, temperature=0.9, top_k=0, seed=3, eos_id=None)
    alone = [
        generate(model, [prompt], max_new_tokens=20, temperature=0.9, top_k=0, seed=3 + i, eos_id=None)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert ids_of(batch) == ids_of(alone)
    assert [reply.prompt_tokens for reply in batch] == [len(prompt) for prompt in PROMPTS]


def test_logits_of_padded_prompts_equal_those_of_single_ones(model):
    with torch.no_grad():
        logits, _ = prefill(model, PROMPTS, 0)
        for row, prompt in zip(logits, PROMPTS, strict=True):
            torch.testing.assert_close(row, model(torch.tensor([prompt]))[0][0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_chunked_prefill_equals_one_pass(model, chunk):
    with torch.no_grad():
        for prompts in (PROMPTS, PROMPTS[2:3]):
            expected, whole = prefill(model, prompts, 2)
            logits, cache = prefill(model, prompts, 2, chunk)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            assert (cache.length, cache.max_len) == (whole.length, whole.max_len) == (11, 13)
            T = len(prompts[-1]) if len(prompts) > 1 else 11
            torch.testing.assert_close(
                cache.k[:, -1, :, 11 - T : 11], whole.k[:, -1, :, 11 - T : 11], atol=1e-5, rtol=1e-5
            )


def test_longer_than_max_seq_len(tiny_model):
    model = tiny_model(max_seq_len=8)
    prompt = [1, *(torch.arange(600) % 40 + 3).tolist()]
    assert generate(model, [prompt], max_new_tokens=3, temperature=0, eos_id=None)[0].ids == plain_greedy(
        model, prompt, 3
    )


def test_finished_rows_leave_and_the_others_do_not_notice(model, monkeypatch):
    free = ids_of(generate(model, PROMPTS, max_new_tokens=24, temperature=0, eos_id=None))
    counts = {token: [reply.index(token) if token in reply else 24 for reply in free] for token in range(48)}
    eos = max(counts, key=lambda token: (len(set(counts[token])), 24 in counts[token]))
    ends = counts[eos]
    assert len(set(ends)) >= 3, f"the rows should end at different times: {ends}"

    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **kw: (sizes.append(len(ids)), forward(ids, **kw))[1])
    replies = generate(model, PROMPTS, max_new_tokens=24, temperature=0, eos_id=eos)
    assert ids_of(replies) == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert [r.finish_reason for r in replies] == ["length" if end == 24 else "stop" for end in ends]
    assert [r.completion_tokens for r in replies] == ends
    steps = max(min(end + 1, 24) for end in ends)
    assert sizes == [4, *(sum(min(end + 1, 24) > step for end in ends) for step in range(1, steps))]


def test_a_limit_for_each_row(tiny_model):
    model = tiny_model()
    replies = generate(model, PROMPTS[:2], max_new_tokens=[2, 5], temperature=0, eos_id=None)
    assert [reply.completion_tokens for reply in replies] == [2, 5]
    assert [reply.finish_reason for reply in replies] == ["length", "length"]


def test_generating_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    generate(model, PROMPTS, max_new_tokens=3)
    loss = F.cross_entropy(model(torch.tensor([[1, 2, 3]]))[0][0], torch.tensor([2, 3, 4]))
    loss.backward()  # inference mode would make this fail if it leaked
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for _ in stream(model, PROMPTS, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled(), "between two pieces the caller may train"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 48]]}, "token 48.*0 to 47"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens"),
        ({"stop": ["x"]}, "need a tokenizer"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be between 0 and 1"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": "0.5"}, "temperature is '0.5'; it must be a number"),
    ],
)
def test_wrong_values_are_named(tiny_model, change, message):
    settings = {"prompts": [[1]], "max_new_tokens": 1} | change
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), settings.pop("prompts"), **settings)


def test_dropout_would_make_replies_random(tiny_model):
    model = tiny_model(dropout=0.5).train()
    with pytest.raises(ValueError, match="eval"):
        generate(model, [[1]], max_new_tokens=1)
    assert model.training


# ---------------------------------------------------------------- sampling

LOGITS = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log() + 3.0  # probabilities that can be read


def close(probs: torch.Tensor, expected: list[float]) -> bool:
    return torch.allclose(probs, torch.tensor([expected], dtype=torch.float32), atol=1e-6)


def test_distribution_by_hand():
    assert close(distribution(LOGITS, temperature=1.0), [0.5, 0.05, 0.3, 0.15])
    squares = [0.25, 0.0025, 0.09, 0.0225]
    assert close(distribution(LOGITS, temperature=0.5), [x / 0.365 for x in squares])
    assert close(distribution(LOGITS, temperature=1.0, top_k=2), [5 / 8, 0, 3 / 8, 0])
    assert close(distribution(LOGITS, temperature=1.0, top_k=0), [0.5, 0.05, 0.3, 0.15])
    assert close(distribution(LOGITS, temperature=1.0, top_k=99), [0.5, 0.05, 0.3, 0.15])
    assert close(distribution(LOGITS, temperature=1.0, top_p=0.4), [1, 0, 0, 0])
    assert close(distribution(LOGITS, temperature=1.0, top_p=0.6), [5 / 8, 0, 3 / 8, 0])
    assert close(distribution(LOGITS, temperature=1.0, top_p=0.9), [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95])
    assert close(distribution(LOGITS, temperature=1.0, top_p=0.0), [1, 0, 0, 0])
    assert close(distribution(LOGITS, temperature=1.0, min_p=0.5), [5 / 8, 0, 3 / 8, 0])
    assert close(distribution(LOGITS, temperature=1.0, min_p=1.0), [1, 0, 0, 0])
    # top_p counts within what top_k left: of 5/8 and 3/8 the first alone reaches 0.6
    assert close(distribution(LOGITS, temperature=1.0, top_k=2, top_p=0.6), [1, 0, 0, 0])
    # temperature comes first: at 0.5 the likeliest has 0.685, so 0.6 takes it alone
    assert close(distribution(LOGITS, temperature=0.5, top_p=0.6), [1, 0, 0, 0])


def test_distribution_at_the_edges():
    assert close(distribution(LOGITS, temperature=1e-5), [1, 0, 0, 0])
    assert close(distribution(LOGITS.bfloat16() * 0, temperature=0.7), [0.25] * 4)
    assert distribution(LOGITS.bfloat16(), temperature=0.7).dtype == torch.float32


def test_a_nucleus_wider_than_the_first_guess():
    logits = torch.randn(3, 6400) * 0.1  # nearly flat: half of the probability is thousands of tokens
    probs = logits.softmax(-1)
    got = distribution(logits, temperature=1.0, top_p=0.5)
    for row in range(3):
        order = probs[row].argsort(descending=True)
        size = int((probs[row][order].double().cumsum(0) < 0.5).sum()) + 1
        assert size > 1000
        assert abs(int((got[row] > 0).sum()) - size) <= 2  # float32 sums of thousands
        assert (got[row][order[: size - 2]] > 0).all()


def test_draw_follows_the_probabilities_and_never_takes_an_excluded_token():
    probs = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]])
    uniform = (torch.arange(1000) / 1000)[:, None]
    counts = draw(probs.expand(1000, -1), uniform).bincount(minlength=6)
    assert counts.tolist() == pytest.approx([0, 200, 0, 500, 300, 0], abs=1)
    assert draw(probs, torch.tensor([[0.0]])).item() == 1
    assert draw(probs, torch.tensor([[1 - 2**-24]])).item() == 4  # the largest number that torch.rand gives


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_the_sign():
    logits = torch.tensor([[2.0, -2.0, 0.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 0.0, 2.0, -2.0]]


def samplers(rows, prompts, vocab_size):
    return [Sampler(row, prompt, vocab_size, CPU, eos_id=2) for row, prompt in zip(rows, prompts, strict=True)]


def test_repetition_penalty_counts_prompt_and_reply_but_not_the_end_token():
    rows = samplers([Sampling(temperature=0, repetition_penalty=2.0)] * 2, [[3, 3], [4, 2]], 6)
    first = torch.tensor([[0.0, 0.0, 0.0, 5.0, 3.0, 2.8], [0.0, 0.0, 4.0, 0.0, 5.0, 3.0]])
    assert Sampler.choose(first, rows) == [4, 2]  # 3 in the first prompt halved to 2.5; the end token not halved
    again = torch.tensor([[0.0, 0.0, 0.0, 5.0, 3.0, 2.8], [-1.0, -9.0, -9.0, -9.0, -0.6, -9.0]])
    assert Sampler.choose(again, rows) == [5, 0]  # 4 is in the first reply now; -0.6 doubled is below -1


def test_presence_and_frequency_penalty_count_the_reply_only():
    logits = torch.tensor([[0.0, 0.0, 0.0, 2.0, 1.7, 1.2]])
    (row,) = samplers([Sampling(temperature=0, presence_penalty=0.5)], [[3, 3, 3]], 6)
    # the 3 of the prompt counts for nothing; then 3 has 1.5, then 4 has 1.2; once there, often is not worse
    assert [Sampler.choose(logits, [row])[0] for _ in range(4)] == [3, 4, 3, 3]
    (row,) = samplers([Sampling(temperature=0, frequency_penalty=0.5)], [[3, 3, 3]], 6)
    # 3: 2.0, 1.5, 1.0   4: 1.7, 1.2, 0.7   5: 1.2, 0.7; equal ones do not occur before the last
    assert [Sampler.choose(logits, [row])[0] for _ in range(3)] == [3, 4, 3]
    (row,) = samplers([Sampling(temperature=0, frequency_penalty=-2.0)], [[5]], 6)
    assert [Sampler.choose(logits, [row])[0] for _ in range(3)] == [3, 3, 3]


def test_logit_bias_and_allowed_tokens():
    logits = torch.tensor([[0.0, 0.0, 0.0, 2.0, 1.7, 1.2]] * 2)
    rows = samplers([Sampling(temperature=0, logit_bias={5: 1, 3: -100}), Sampling(temperature=0)], [[1]] * 2, 6)
    assert Sampler.choose(logits, rows) == [5, 3]
    only = torch.tensor([False, True, True, False, False, False])
    assert Sampler.choose(logits, rows, [None, only]) == [5, 1]
    assert logits.unique().tolist() == torch.tensor([0.0, 1.2, 1.7, 2.0]).tolist(), "the caller's logits stay"
    drawn = samplers([Sampling(temperature=2.0, top_k=4, seed=1)], [[1]], 6)
    assert {Sampler.choose(logits[:1], drawn, [only])[0] for _ in range(40)} == {1, 2}
    with pytest.raises(ValueError, match="token 6; the model knows 0 to 5"):
        samplers([Sampling(logit_bias={6: 1.0})], [[1]], 6)
    for bad in ({1: 101}, {"1": 1}, {-1: 1}, {1: float("nan")}, {1: True}):
        with pytest.raises(ValueError, match="logit_bias"):
            Sampling(logit_bias=bad)


def test_the_k_likeliest_are_found_as_on_the_whole_vocabulary():
    """choose works on k candidates; equal logits at the edge must all be in, as distribution defines it."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    logits[2].mul_(2).round_()  # many equal ones
    for settings in (dict(top_k=5), dict(top_k=49), dict(top_k=7, top_p=0.6), dict(top_k=9, min_p=0.2)):
        probs = distribution(logits, temperature=0.9, **settings)
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        rows = samplers([Sampling(temperature=0.9, seed=i, **settings) for i in range(4)], [[1]] * 4, 50)
        for _ in range(20):
            uniform = torch.stack([torch.rand(1, generator=generator) for generator in generators])
            assert Sampler.choose(logits, rows) == draw(probs, uniform).tolist()


def test_generate_repeats_less_with_a_penalty(tiny_model):
    model = tiny_model()
    plain = generate(model, [[1, 5]], max_new_tokens=40, temperature=0, eos_id=None)[0].ids
    penalized = generate(model, [[1, 5]], max_new_tokens=40, temperature=0, repetition_penalty=5.0, eos_id=None)[0].ids
    assert len(set(penalized)) > len(set(plain))


def test_rows_with_settings_of_their_own():
    settings = [Sampling(temperature=5e-324), Sampling(temperature=1.0, top_k=1)]
    settings.append(Sampling(temperature=1.0, top_k=0, seed=5))
    logits = torch.randn(3, 50)
    mixed, alone = samplers(settings, [[1]] * 3, 50), samplers(settings, [[1]] * 3, 50)
    for _ in range(5):
        got = Sampler.choose(logits, mixed)
        assert got == [Sampler.choose(logits[i : i + 1], [row])[0] for i, row in enumerate(alone)]
        assert got[:2] == logits.argmax(-1)[:2].tolist()
    assert Sampler.choose(logits[2:], mixed[2:]) == Sampler.choose(logits[2:], alone[2:])


def test_seeds(tiny_model):
    model = tiny_model()
    settings = dict(max_new_tokens=16, temperature=1.5, top_k=0, eos_id=None)
    one = ids_of(generate(model, [[1, 5]] * 3, seed=7, **settings))
    assert one == ids_of(generate(model, [[1, 5]] * 3, seed=7, **settings))
    assert len(set(map(tuple, one))) == 3, "equal prompts in a batch get different replies"
    assert ids_of(generate(model, [[1, 9, 9], [1, 5]], seed=6, **settings))[1] == one[0]
    assert ids_of(generate(model, [[1, 5]], seed=8, **settings))[0] == one[1]
    torch.manual_seed(0)
    first = ids_of(generate(model, [[1, 5]], **settings))
    torch.manual_seed(0)
    assert first != ids_of(generate(model, [[1, 5]], **settings)), "without a seed, another reply each time"


def test_sampled_tokens_have_the_frequencies_of_the_distribution(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5]]))[0][:, -1]
    probs = distribution(logits, temperature=1.0, top_k=5)[0]
    replies = generate(model, [[1, 5]] * 4000, max_new_tokens=1, temperature=1.0, top_k=5, seed=0, eos_id=None)
    counts = torch.tensor([reply.ids[0] for reply in replies]).bincount(minlength=48)
    assert set(counts.nonzero().flatten().tolist()) == set(probs.nonzero().flatten().tolist())
    spread = (probs * (1 - probs) / 4000).sqrt()
    assert ((counts / 4000 - probs).abs() <= 4 * spread).all()


# ---------------------------------------------------------------- text

TEXTS = ["你好，世界！", "emoji 👩‍👩‍👧 🀄 and 𠮷", "mixed 中文 and English\n\ttabs", "ﷺ é ñ \u200d"]


def byte_ids(tokenizer, text: str) -> list[int]:
    """The text as single-byte tokens, so that every character is split over tokens."""
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_has_no_half_characters(tokenizer, text):
    for ids in (byte_ids(tokenizer, text), tokenizer.encode(text)):
        streamer = TextStreamer(tokenizer)
        pieces = [streamer.push(i) for i in ids]
        assert "".join(pieces) == text
        assert streamer.finish() == ""
        assert all("\ufffd" not in piece for piece in pieces)
    streamer = TextStreamer(tokenizer)
    assert [streamer.push(i) for i in byte_ids(tokenizer, "a👧b")] == ["a", "", "", "", "👧", "b"]


def test_half_a_character_at_the_end_is_never_shown(tokenizer):
    streamer = TextStreamer(tokenizer)
    assert "".join(map(streamer.push, byte_ids(tokenizer, "好👧")[:-1])) + streamer.finish() == "好"


def test_streamed_text_is_what_decode_gives_for_any_tokens(tokenizer):
    generator = torch.Generator().manual_seed(0)
    bytes_only = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    for round_ in range(300):
        choices = bytes_only if round_ % 2 else range(tokenizer.vocab_size)
        ids = [choices[i] for i in torch.randint(len(choices), (20,), generator=generator).tolist()]
        ids += tokenizer.encode("。")  # a whole character last: what is half before it is broken, not unfinished
        streamer = TextStreamer(tokenizer)
        assert "".join(map(streamer.push, ids)) + streamer.finish() == tokenizer.decode(ids)


def test_pushing_takes_no_longer_as_the_text_grows(tokenizer):
    class Counting:
        calls = 0

        def token_bytes(self, i):
            self.calls += 1
            return tokenizer.token_bytes(i)

    counting = Counting()
    streamer = TextStreamer(counting, ["never to be seen"])
    for _ in range(2000):
        streamer.push(300)
    assert counting.calls == 2000
    assert len(streamer.held) < 20


@pytest.mark.parametrize(
    "text, stop, shown",
    [
        ("问：答：停止，之后", ["停止"], "问：答："),
        ("abcabd!", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("ends with the beginning of a sto", ["stop"], "ends with the beginning of a sto"),
        ("one\n\ntwo", ["\n\n", "tw"], "one"),
        ("👧👧", ["👧"], ""),
        ("later then sooner", ["sooner", "later then s"], ""),
        ("no match", ["x"], "no match"),
    ],
)
def test_stop_strings_never_leak(tokenizer, text, stop, shown):
    for ids in (byte_ids(tokenizer, text), tokenizer.encode(text)):
        streamer, seen = TextStreamer(tokenizer, stop), ""
        for i in ids:
            seen += streamer.push(i)
            assert shown.startswith(seen)
            if streamer.stopped:
                break
        seen += streamer.finish()
        assert seen == shown
        assert streamer.stopped == (shown != text)


def test_text_is_held_back_only_while_it_may_become_a_stop_string(tokenizer):
    streamer = TextStreamer(tokenizer, ["abc"])
    assert [streamer.push(i) for i in byte_ids(tokenizer, "xabxa")] == ["x", "", "", "abx", ""]
    assert streamer.finish() == "a"


def test_of_two_stop_strings_in_one_token_the_first_counts():
    streamer = TextStreamer(SimpleNamespace(token_bytes=lambda i: b"one, two"), ["two", ","])
    assert streamer.push(0) == "one" and streamer.stopped


@pytest.mark.parametrize("stop", ["a string", [""], [3]])
def test_wrong_stop_strings_are_refused(tokenizer, stop):
    with pytest.raises(ValueError, match="stop must be a list"):
        TextStreamer(tokenizer, stop)


class Script:
    """Stands for a model that says given tokens; a prompt is one token, the number of its reply.

    Writes that number into the cache, so that it knows its rows again after some have left.
    """

    training = False

    def __init__(self, rows: list[list[int]], config):
        self.rows, self.config = rows, config
        config.vocab_size = 6400

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, input_ids, *, cache, select=None, attention_mask=None):
        if cache.length == 0:
            cache.v[0, :, 0, 0, 0] = input_ids[:, 0]
        replies = [self.rows[int(number)] for number in cache.v[0, :, 0, 0, 0]]
        tokens = torch.tensor([row[cache.length] if cache.length < len(row) else 2 for row in replies])
        cache.length += 1
        logits = F.one_hot(tokens, 6400).float()
        return (logits if select is not None else logits[:, None]), None


def test_stream_gives_text_as_it_comes_and_says_why_it_ended(tokenizer, tiny_config):
    texts = ["好👧", "stop here", "too long", "top"]
    rows = [byte_ids(tokenizer, text) for text in texts]
    model = Script(rows, tiny_config())
    settings = dict(max_new_tokens=8, temperature=0, tokenizer=tokenizer, stop=["p h"])
    pieces = list(stream(model, [[0], [1], [2], [3]], **settings))
    for row, (text, reason) in enumerate([("好👧", "stop"), ("sto", "stop"), ("too long", "length"), ("top", "stop")]):
        mine = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in mine) == mine[-1].reply.text == text
        assert mine[-1].reply.finish_reason == reason
    assert [piece.text for piece in pieces if piece.row == 0] == [
        "",
        "",
        "好",
        "",
        "",
        "",
        "👧",
        "",
    ]
    assert [piece.text for piece in pieces if piece.row == 1] == ["s", "t", "o", "", "", ""]
    assert [piece.text for piece in pieces if piece.row == 3] == ["t", "o", "", "p"]  # may have become "p h"
    assert [reply.completion_tokens for reply in generate(model, [[0], [1], [2]], **settings)] == [7, 6, 8]


# ---------------------------------------------------------------- prompts that fit


def conversation(turns: int, system: str | None = None) -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    for i in range(turns):
        messages.append({"role": "user", "content": f"第{i}个问题是什么呢？"})
        messages.append({"role": "assistant", "content": f"第{i}个回答，{'很长' * i}。"})
    return messages[:-1]


@pytest.mark.parametrize("system", [None, "你是一个助手。"])
def test_whole_oldest_turns_are_dropped(tokenizer, system):
    messages = conversation(6, system)
    first = 1 if system else 0
    whole = tokenizer.encode_chat(messages)
    assert fit_messages(messages, tokenizer, len(whole) + 5, 5) == (whole, 0, 0)
    seen = set()
    for limit in range(len(whole) + 4, 45, -1):
        fitted = fit_messages(messages, tokenizer, limit, 5)
        rest = messages[:first] + messages[first + 2 * fitted.dropped_turns :]
        assert fitted.ids == tokenizer.encode_chat(rest)
        assert len(fitted.ids) <= limit - 5
        if fitted.dropped_turns:  # one turn fewer dropped would not have fitted
            more = messages[:first] + messages[first + 2 * (fitted.dropped_turns - 1) :]
            assert len(tokenizer.encode_chat(more)) > limit - 5
            assert f"oldest {fitted.dropped_turns} turn" in fitted.note
        seen.add(fitted.dropped_turns)
        assert fitted.cut_tokens == 0
    assert seen == set(range(1, 6))


@pytest.mark.parametrize("content", ["很长的问题👧，" * 100 + "最后一句。", "a " * 500 + "end", "👩‍👩‍👧" * 100])
@pytest.mark.parametrize("system", [None, "你是一个助手。"])
def test_a_question_too_long_by_itself_loses_its_beginning(tokenizer, content, system):
    messages = conversation(2, system)[:-1] + [{"role": "user", "content": content}]
    for limit in range(64, 90):
        fitted = fit_messages(messages, tokenizer, limit, 20)
        assert limit - 20 - 6 <= len(fitted.ids) <= limit - 20, "it is used to the brim, but for a split character"
        assert fitted.dropped_turns == 1 and fitted.cut_tokens > 0
        assert f"first {fitted.cut_tokens} tokens" in fitted.note
        text = tokenizer.decode(fitted.ids, skip_special=False)
        start, end = f"{system or ''}<s>user\n", "</s>\n<s>assistant\n"
        assert text.startswith(start) and text.endswith(end)
        kept = text[len(start) : -len(end)]
        assert kept and content.endswith(kept)


def test_what_cannot_fit_is_said(tokenizer):
    with pytest.raises(ValueError, match="must be the user's"):
        fit_messages(conversation(2)[:-1], tokenizer, 100, 10)
    with pytest.raises(ValueError, match="system message of .* tokens; shorten it"):
        fit_messages(conversation(1, "系统" * 200), tokenizer, 100, 10)
    with pytest.raises(ValueError, match="raise the limit"):
        fit_messages(conversation(1), tokenizer, 16, 10)
    with pytest.raises(ValueError, match="no room"):
        fit_prompt("text", tokenizer, 10, 9)


def test_a_text_to_continue_keeps_its_end(tokenizer):
    text = "从前有座山，" * 50 + "山里有座庙"
    ids = tokenizer.encode(text)
    assert fit_prompt(text, tokenizer, 1000, 10) == ([1, *ids], 0, 0)
    fitted = fit_prompt(text, tokenizer, 40, 10)
    assert fitted.ids == [1, *ids[-29:]]
    assert fitted.cut_tokens == len(ids) - 29
    assert fit_prompt("<s></s>", tokenizer, 40, 10).ids[0] == 1
    assert not {0, 1, 2} & set(fit_prompt("<s></s>", tokenizer, 40, 10).ids[1:])


# ---------------------------------------------------------------- prepare


def test_prepared_model_computes_the_same(model):
    ids = torch.randint(3, 48, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask)[0]
        prompts = [prompt * 2 for prompt in PROMPTS]
        replies = ids_of(generate(model, prompts, max_new_tokens=20, temperature=0, eos_id=None))
        fast = prepare(copy.deepcopy(model), CPU, torch.float32)
        torch.testing.assert_close(fast(ids, attention_mask=mask)[0][mask], expected[mask], atol=2e-5, rtol=1e-5)
        assert ids_of(generate(fast, prompts, max_new_tokens=20, temperature=0, eos_id=None)) == replies
        documents = torch.tensor([[1] * 4 + [2] * 5] * 3)
        torch.testing.assert_close(fast(ids, documents=documents)[0], model(ids, documents=documents)[0])
    kinds = {type(module).__name__ for module in fast.modules()}
    if can_pack(CPU, torch.float32):
        assert {"PackedLinear", "PackedAttention", "PackedFeedForward"} <= kinds and "Linear" not in kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prepared_model_in_16_bits_stays_near(tiny_model, dtype):
    model = tiny_model()
    ids = torch.randint(3, 48, (2, 9))
    with torch.inference_mode():
        expected = model(ids)[0]
        plain = copy.deepcopy(model).to(dtype)(ids)[0].float()
        fast = prepare(copy.deepcopy(model), CPU, dtype)
        logits = fast(ids)[0]
        only_weights = dtype == torch.float16 and can_pack(CPU, dtype)
        assert logits.dtype == (torch.float32 if only_weights else dtype)
        assert (logits.float() - expected).abs().max() <= 2 * (plain - expected).abs().max()
        cache = KVCache(model.config, 2, 9, logits.dtype)
        steps = [fast(ids[:, t : t + 1], cache=cache)[0] for t in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1).float(), expected, atol=0.3, rtol=0.1)


def test_prepare_reaches_every_shape(tiny_model):
    """Multi-head and multi-query attention, no shared expert, one row and none."""
    for change in ({"n_kv_heads": 4}, {"n_kv_heads": 1}, {"use_moe": True, "n_shared_experts": 0}):
        model = tiny_model(**change)
        ids = torch.randint(3, 48, (1, 1))  # one token: most experts get none
        with torch.inference_mode():
            expected = model(ids)[0]
            got = prepare(model, CPU, torch.float32)(ids)[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this CPU has no packed kernels")
def test_packed_layers_equal_plain_ones(tiny_model):
    plain = tiny_model().layers[0].feed_forward
    linear = torch.nn.Linear(32, 7, bias=False)
    with torch.inference_mode():
        for rows in (0, 1, 5, 300):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(PackedLinear(linear.weight)(x), linear(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(PackedFeedForward(plain)(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_prepared_model_on_golden_logits(shared_data, name):
    """v1's own weights and logits."""
    folder = shared_data / "golden_v1" / name
    model = Transformer(LMConfig(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
    expected = {key: torch.from_numpy(value) for key, value in np.load(folder / "expected.npz").items()}
    with torch.inference_mode():
        logits = prepare(model, CPU, torch.float32)(expected["tokens"])[0]
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=1e-4)
