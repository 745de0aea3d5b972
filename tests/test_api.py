"""The HTTP server: a real process on a real port, the real openai client, and raw requests for what is wrong."""

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types

import httpx
import openai
import pytest
import torch
from stages import REPO, command

import my_openai_api as api
from model import protocol
from model.chat import ChatModel
from model.checkpoint import load_model
from model.generate import fit_prompt, generate
from model.tokenizer import load_tokenizer
from model.tools import flatten

ASK = [{"role": "user", "content": "春 夏 秋？"}]
CONTEXT = 3000  # far more than the model was trained on: for replies that take a while
KEY = {"Authorization": "Bearer secret"}
LONG = {"messages": ASK, "ignore_eos": True, "stream": True}
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@contextlib.contextmanager
def running(weights, *more):
    """A server of these weights: its process and address. Its exit code must be 0."""
    settings = ["--port", "0", "--max_seq_len", str(CONTEXT), "--max_batch", "3", "--max_queue", "3", *more]
    arguments = ["--weight", str(weights), "--device", "cpu", "--dtype", "float32", *settings]
    environment = os.environ | {"MINIMIND_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("my_openai_api.py", *arguments), stderr=subprocess.PIPE, text=True, env=environment, cwd="/"
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.match(r"serving at (http://127\.0\.0\.1:\d+)/v1", line):
            break
    else:
        pytest.fail("the server did not start: " + "".join(lines))
    rest = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)  # the pipe must not fill up
    rest.start()
    try:
        yield process, found[1], lines
    finally:
        process.terminate()
        assert process.wait(30) == 0, "".join(lines)
        rest.join()


@pytest.fixture(scope="module")
def server(sft_weights):
    """(address, lines of the log)"""
    with running(sft_weights, "--cors_origin", "http://page.example") as (_, address, lines):
        yield address, lines
    assert not any("Traceback" in line for line in lines)
    assert not any("春" in line for line in lines)  # nothing of a prompt is logged


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="secret", max_retries=0)


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], headers=KEY, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def model(sft_weights):
    return load_model(sft_weights)[0]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def chat(client, messages=ASK, **settings):
    settings = {"model": client.models.list().data[0].id, "temperature": 0, "max_tokens": 40} | settings
    return client.chat.completions.create(messages=messages, **settings)


def metric(http, name: str) -> float:
    return float(re.search(rf"^minimind_{re.escape(name)} (\S+)$", http.get("/metrics").text, re.MULTILINE)[1])


def wait_for(http, name: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while metric(http, name) != value:
        assert time.monotonic() < deadline, http.get("/metrics").text
        time.sleep(0.02)


# ---------------------------------------------------------------- replies


def test_chat_says_what_generate_says_whole_and_streamed(client, model, tokenizer):
    ids = tokenizer.encode_chat(ASK)
    [expected] = generate(model, [ids], max_new_tokens=40, tokenizer=tokenizer, temperature=0)
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    choice = whole.choices[0]
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(expected.ids))
    assert whole.usage.total_tokens == len(ids) + len(expected.ids)

    *news, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in news) == expected.text
    assert news[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in news] == [None] * (len(news) - 1) + [expected.finish_reason]
    assert last.choices == [] and last.usage.completion_tokens == len(expected.ids)
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (news[0].id, news[0].created, "chat.completion.chunk")
    }


def test_an_assistant_message_at_the_end_is_continued(client):
    whole = chat(client, max_tokens=20).choices[0].message.content
    begun = {"role": "assistant", "content": whole[:5]}
    assert whole[:5] + chat(client, [*ASK, begun], max_tokens=20).choices[0].message.content[:3] == whole[:8]


def test_content_may_come_in_parts_and_roles_in_any_order(client):
    parts = [{"type": "text", "text": text} for text in ("春", "夏")]
    joined = chat(client, [{"role": "system", "content": "山"}, {"role": "user", "content": "春\n夏"}])
    given = chat(client, [{"role": "user", "content": parts}, {"role": "developer", "content": "山"}])
    assert given.choices == joined.choices and given.usage.prompt_tokens == joined.usage.prompt_tokens


def test_a_stop_string_never_leaks_though_it_spans_tokens(client):
    text = chat(client).choices[0].message.content
    stop = text[3:7]
    stopped = chat(client, stop=["not there", stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = chat(client, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]


def test_choice_i_has_the_seed_plus_i(client):
    settings = {"temperature": 1.5, "extra_body": {"top_k": 0}, "max_tokens": 12}
    several = chat(client, n=3, seed=2**64 - 1, **settings)
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) > 1
    assert texts[1] == chat(client, seed=0, **settings).choices[0].message.content  # seeds count modulo 2**63
    assert several.usage.prompt_tokens == len(load_tokenizer().encode_chat(ASK))
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, seed=2**64 - 1, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_sampling_settings_reach_the_engine(client):
    text = chat(client).choices[0].message.content
    for extra in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 5}}):
        assert chat(client, **extra).choices[0].message.content != text, extra
    assert chat(client, logit_bias={"100": 100}, max_tokens=3).choices[0].message.content == (
        load_tokenizer().decode([100] * 3)
    )
    settings = {"temperature": 2, "max_tokens": 40}
    for extra in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1, "top_k": -1}}):
        assert chat(client, **settings, **extra).choices[0].message.content == text, extra


def test_logprobs_are_those_of_the_model(client, model, tokenizer):
    ids = tokenizer.encode_chat(ASK)
    expected = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    first = choice.logprobs.content[0]
    assert first.logprob == pytest.approx(expected.max().item(), abs=1e-4)
    assert first.token == tokenizer.decode([expected.argmax()]) == first.top_logprobs[0].token
    assert first.top_logprobs[1].logprob == pytest.approx(expected.topk(2).values[1].item(), abs=1e-4)
    assert b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode() == choice.message.content
    streamed = [chunk.choices[0].logprobs for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)]
    assert [one.token for part in streamed if part for one in part.content] == [
        one.token for one in choice.logprobs.content
    ]


def test_json_object_is_held_to_json(client, tokenizer):
    bias = {str(tokenizer.encode(text)[0]): 100 for text in ("{", "}")}
    assert chat(client, logit_bias=bias).choices[0].message.content not in ("{}", "")
    reply = chat(client, logit_bias=bias, response_format={"type": "json_object"}).choices[0]
    assert json.loads(reply.message.content) == {} and reply.finish_reason == "stop"


def test_tools_that_fill_the_context_are_left_out_unless_they_must_be_called(client, http):
    described = {"description": "很长的说明。" * 40}
    many = [{"type": "function", "function": {"name": f"f{i}", **described}} for i in range(60)]
    plain = chat(client).choices[0].message.content
    reply = http.post("/v1/chat/completions", json={"messages": ASK, "temperature": 0, "max_tokens": 40, "tools": many})
    assert reply.json()["choices"][0]["message"]["content"] == plain and reply.headers["x-tools-left-out"] == "60"
    streamed = {"messages": ASK, "max_tokens": 2, "tools": many, "stream": True, "tool_choice": "auto"}
    assert http.post("/v1/chat/completions", json=streamed).headers["x-tools-left-out"] == "60"
    assert metric(http, "tools_left_out_total") == 120
    assert "x-tools-left-out" not in http.post("/v1/chat/completions", json={"messages": ASK}).headers
    with pytest.raises(openai.BadRequestError, match="messages and tools make") as refused:
        chat(client, tools=many, tool_choice="required")
    assert refused.value.code == "context_length_exceeded"


def test_ollamas_name_of_the_repetition_penalty(client):
    texts = [
        chat(client, extra_body=extra | {"ignore_eos": True}).choices[0].message.content
        for extra in ({}, {"repeat_penalty": 9.0}, {"repetition_penalty": 9.0})
    ]
    assert texts[0] != texts[1] == texts[2]


def test_tools_are_called_and_their_results_read(client, http, tokenizer):
    bias = {str(tokenizer.encode(text)[0]): 100 for text in ("{", "}")}  # ends the arguments soon
    tools = [{"type": "function", "function": WEATHER}]
    settings = {"tools": tools, "logit_bias": bias, "max_tokens": 100}
    forced = chat(client, tool_choice={"type": "function", "function": {"name": "get_weather"}}, **settings).choices[0]
    required = list(chat(client, tool_choice="required", stream=True, **settings))
    assert forced.finish_reason == required[-1].choices[0].finish_reason == "tool_calls"
    [call] = forced.message.tool_calls
    assert (call.function.name, call.function.arguments, forced.message.content) == ("get_weather", "{}", None)
    calls = [chunk.choices[0].delta.tool_calls[0] for chunk in required if chunk.choices[0].delta.tool_calls]
    assert calls[0].id and calls[0].function.name == "get_weather"
    assert "".join(call.function.arguments for call in calls) == "{}"

    result = {"role": "tool", "tool_call_id": call.id, "content": "12"}
    messages = [*ASK, forced.message.model_dump(exclude_none=True), result]
    flat = flatten(messages, tools)
    prompt = len(tokenizer.encode_chat(flat[:-1])) + len(tokenizer.encode(flat[-1]["content"]))
    assert chat(client, messages, tools=tools).usage.prompt_tokens == prompt

    old = {"messages": ASK, "functions": [WEATHER], "function_call": {"name": "get_weather"}, "logit_bias": bias}
    choice = http.post("/v1/chat/completions", json=old).json()["choices"][0]
    assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": "{}"}
    assert choice["finish_reason"] == "function_call"


def test_completions_go_on_with_a_text(client, model, tokenizer):
    name = client.models.list().data[0].id
    settings = {"model": name, "max_tokens": 10, "temperature": 0}
    texts = ["春 夏", "one two"]
    prompts = [fit_prompt(text, tokenizer, 60, 10).ids for text in texts]
    expected = generate(model, prompts, max_new_tokens=10, tokenizer=tokenizer, temperature=0)
    reply = client.completions.create(prompt=texts, logprobs=2, **settings)
    assert [choice.text for choice in reply.choices] == [one.text for one in expected]
    assert reply.usage.prompt_tokens == sum(map(len, prompts))
    assert client.completions.create(prompt=prompts, **settings).choices[1].text == expected[1].text
    logprobs = reply.choices[0].logprobs
    assert [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))] == logprobs.text_offset
    assert all(
        math.isclose(max(top.values()), logprobs.token_logprobs[i]) for i, top in enumerate(logprobs.top_logprobs)
    )
    pieces = client.completions.create(prompt=texts[0], echo=True, stream=True, **settings)
    assert "".join(piece.choices[0].text for piece in pieces) == texts[0] + expected[0].text


def test_embeddings_are_the_mean_of_the_last_hidden_states(client, model, tokenizer):
    name, texts = client.models.list().data[0].id, ["春 夏 秋", *["one"] * 7]  # more than there are slots
    encoded = client.embeddings.create(model=name, input=texts)  # the client asks for base64
    plain = client.embeddings.create(model=name, input=texts, encoding_format="float")
    ids = [tokenizer.bos_id, *tokenizer.encode(texts[0])]
    hidden = model.norm(model.hidden_states(torch.tensor([ids]))[0])[0].mean(0)
    expected = torch.nn.functional.normalize(hidden, dim=0).tolist()
    assert plain.data[0].embedding == pytest.approx(expected, abs=1e-4)
    assert encoded.data[0].embedding == pytest.approx(expected, abs=1e-4)
    assert [one.index for one in plain.data] == list(range(8))
    assert plain.usage.total_tokens == len(ids) + 7 * (1 + len(tokenizer.encode("one")))


def test_events_are_written_as_openai_writes_them(http):
    body = {"messages": ASK, "stream": True, "max_tokens": 3}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        raw = response.read()
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = raw.split(b"\n\n")
    assert end == b"data: [DONE]" and nothing == b""
    for event in events:
        assert event.startswith(b"data: {") and b"\n" not in event
        chunk = json.loads(event[6:])
        assert chunk.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert chunk["choices"][0].keys() == {"index", "delta", "logprobs", "finish_reason"}


# ---------------------------------------------------------------- what is wrong

BIG = "春" * 40000
CHAT_ERRORS = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": BIG}]}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": BIG[:4000]}]}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": ""}] * 4097}, "messages", "invalid_value"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing_required_parameter"),
    ({"stop": {}}, "stop", "invalid_type"),
    ({"max_tokens": {}}, "max_tokens", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"presence_penalty": -3}, "presence_penalty", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": -2}, "max_completion_tokens", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 7}, "n", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
    ({"logit_bias": {"6400": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.type", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"functions": [WEATHER], "tools": [{"type": "function", "function": WEATHER}]}, "functions", "invalid_value"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "param", "code"), CHAT_ERRORS)
def test_a_wrong_field_is_named(http, extra, param, code):
    response = http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 2} | extra)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 400


def test_other_errors_have_the_same_form(http):
    def check(response, status, param=None):
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["param"] == param
        return error["message"]

    path = "/v1/chat/completions"
    for raw in (b"", b"[" * 100_000, b'{"messages": NaN}', b"\xff", b"[]", b"1" * 5000, b'{"a":' * 9 + b"1"):
        check(http.post(path, content=raw), 400)
    check(http.post(path, content=b"x" * (4 << 20) + b"x"), 413)
    check(http.post(path, content=(b"x" * (1 << 20) for _ in range(5))), 413)  # chunked: no length is told
    assert "pretrain_32" in check(http.post(path, json={"messages": ASK, "model": "gpt-4"}), 404, "model")
    check(http.get("/v1/models/gpt-4"), 404, "model")
    check(http.get("/nothing"), 404)
    check(http.get(path), 405)
    check(http.post("/v1/completions", json={"prompt": "x", "suffix": "y"}), 400, "suffix")
    check(http.post("/v1/completions", json={"prompt": "x", "echo": True, "logprobs": 1}), 400, "echo")
    check(http.post("/v1/completions", json={"prompt": [6400]}), 400, "prompt")
    check(http.post("/v1/completions", json={"prompt": [5] * CONTEXT}), 400, "prompt")
    check(http.post("/v1/embeddings", json={"input": []}), 400, "input")
    check(http.post("/v1/embeddings", json={"input": "x", "dimensions": 8}), 400, "dimensions")
    numbers = check(http.post(path, json={"messages": [{"role": "user", "content": "春 " * 2000}]}), 400, "messages")
    assert str(CONTEXT) in numbers and "--max_seq_len" in numbers
    half = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1.0, "n": None, "private": 1, "store": False}
    assert http.post(path, content=json.dumps(half).replace('"a"', '"\\ud83d"')).status_code == 200


def test_the_key_is_asked_for_and_other_pages_are_not_let_in(server):
    address = server[0]
    for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
        response = httpx.post(f"{address}/v1/chat/completions", json={"messages": ASK}, headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{address}/v1/models").status_code == 401
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    for origin, allowed in (("http://page.example", "http://page.example"), ("http://evil.example", None)):
        response = httpx.get(f"{address}/v1/models", headers=KEY | {"Origin": origin})
        assert response.headers.get("access-control-allow-origin") == allowed
        assert response.status_code == (200 if allowed else 403)
    lower = httpx.get(f"{address}/v1/models", headers={"Authorization": "bearer secret", "Origin": address})
    assert lower.status_code == 200, "the scheme in any case, and the server's own pages"


def test_without_a_key_only_local_names_are_answered():
    """A web page may lead a name of its own to this machine and would then be of the same origin."""
    gate = api.Gate(None, types.SimpleNamespace(metrics=None, api_key=None), (), only_local=True)
    for host in (b"127.0.0.1:8000", b"localhost:8000", b"LOCALHOST", b"[::1]:8000"):
        assert gate.refusal("/v1/models", {b"host": host}) is None
    for headers in ({b"host": b"evil.example:8000"}, {}, {b"host": b"localhost", b"origin": b"null"}):
        assert gate.refusal("/v1/models", headers).status == 403
    open_gate = api.Gate(None, types.SimpleNamespace(metrics=None, api_key=None), ("*",), only_local=False)
    assert open_gate.refusal("/v1/models", {b"host": b"chat.example", b"origin": b"http://other.example"}) is None


def test_a_million_faults_are_one_fault():
    """pydantic would list them all: gigabytes, and a server that stands still for a minute."""
    for schema, name, values in (
        (protocol.CompletionRequest, "prompt", [1.5] * 500_000),
        (protocol.CompletionRequest, "prompt", [{}] * 500_000),
        (protocol.ChatRequest, "messages", [{"role": "user", "content": [{}] * 300_000}]),
        (protocol.EmbeddingRequest, "input", [[1.5] * 2000] * 200),
    ):
        tracemalloc.start()
        with pytest.raises(protocol.ApiError) as refused:
            protocol.parse(schema, json.dumps({"messages": ASK, name: values}).encode())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert refused.value.body["error"]["param"].startswith(name)
        assert peak < 200e6


def with_api(engine, talk):
    """Runs talk(api, http) against the API in this process, the engine driven as in the server."""

    async def run():
        served = api.Api(engine, engine.tokenizer, "m")
        driver = asyncio.create_task(served.service.drive())
        transport = httpx.ASGITransport(served.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await talk(served, http)
        driver.cancel()

    asyncio.run(run())


def test_a_list_of_embeddings_that_has_begun_waits_for_room(sft_weights):
    engine = ChatModel.from_pretrained(sft_weights, device="cpu", dtype="float32", max_batch=3).engine

    async def talk(served, http):
        submit, full, calls = served.service.submit, [2, 3], []  # full: the calls that find no room

        def submit_or_refuse(requests):
            calls.append(requests)
            if len(calls) in full:
                raise protocol.ApiError(503, "full", code="queue_full")
            return submit(requests)

        served.service.submit = submit_or_refuse
        answer = await http.post("/v1/embeddings", json={"input": ["春 夏 秋"] * 7})
        assert answer.status_code == 200 and [one["index"] for one in answer.json()["data"]] == list(range(7))
        full[:] = range(6, 99)
        assert (await http.post("/v1/embeddings", json={"input": "春"})).status_code == 503, "before it has begun"

    with_api(engine, talk)


def test_a_body_that_does_not_come_is_not_waited_for(sft_weights, monkeypatch):
    monkeypatch.setattr(api, "STALL_SECONDS", 0.1)
    engine = ChatModel.from_pretrained(sft_weights, device="cpu", dtype="float32", max_batch=1).engine

    async def half():
        yield b'{"messages": '
        await asyncio.sleep(60)

    async def talk(served, http):
        answer = await http.post("/v1/chat/completions", content=half())
        assert answer.status_code == 408 and "0.1 seconds" in answer.json()["error"]["message"]

    with_api(engine, talk)


def test_the_description_covers_what_is_served(http):
    schema = http.get("/openapi.json").json()
    post = schema["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "403", "404", "408", "413", "500", "503"} == post["responses"].keys()
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["temperature"]["default"] == 0.7 and fields["top_k"]["default"] == 8
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(schema)))
    assert references <= schema["components"]["schemas"].keys()


# ---------------------------------------------------------------- coming and going


def test_a_client_that_goes_away_frees_its_slot(http):
    cancelled = 'replies_total{finish_reason="cancelled"}'
    before = metric(http, cancelled)
    with http.stream("POST", "/v1/chat/completions", json=LONG) as response:
        assert response.status_code == 200
        wait_for(http, "slots_running", 1)
    wait_for(http, cancelled, before + 1)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=LONG | {"stream": False}, timeout=0.3)
    wait_for(http, cancelled, before + 2)
    assert metric(http, "slots_running") == metric(http, "queue_waiting") == 0


def test_a_full_queue_says_when_to_come_again(http, client):
    with contextlib.ExitStack() as stack:
        for _ in range(6):  # three slots, and three places in the queue
            stream = stack.enter_context(http.stream("POST", "/v1/chat/completions", json=LONG))
            assert stream.status_code == 200
        wait_for(http, "slots_running", 3)
        assert metric(http, "queue_waiting") == 3
        response = http.post("/v1/chat/completions", json={"messages": ASK})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert int(response.headers["retry-after"]) > 0
        with pytest.raises(openai.InternalServerError):
            chat(client)
    wait_for(http, "slots_running", 0)
    assert metric(http, "queue_waiting") == 0 and chat(client).choices


def test_metrics_count_tokens_and_requests(http, tokenizer):
    names = ["prompt_tokens_total", "reply_seconds_count", "time_to_first_token_seconds_count"]
    request = 'http_requests_total{endpoint="/v1/completions",status="200"}'
    http.post("/v1/completions", json={"prompt": "春", "max_tokens": 1})
    before = [metric(http, name) for name in (*names, request)]
    http.post("/v1/completions", json={"prompt": "春", "max_tokens": 1})
    after = [metric(http, name) for name in (*names, request)]
    added = [b - a for a, b in zip(before, after, strict=True)]
    assert added == [1 + len(tokenizer.encode("春")), 1, 1, 1]


def test_a_signal_ends_the_server_after_its_replies(sft_weights):
    body = LONG | {"max_tokens": 800}
    with running(sft_weights) as (process, address, _):
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, headers=KEY, timeout=30) as response:
            parts = response.iter_raw()
            text = next(parts)
            process.send_signal(signal.SIGTERM)
            port = int(address.rpartition(":")[2])
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)):
                        break
            else:
                pytest.fail("the server still takes connections")
            text += b"".join(parts)
        assert text.endswith(b"data: [DONE]\n\n") and text.count(b'"finish_reason":"length"') == 1
        assert process.wait(20) == 0


def test_a_failing_step_is_an_error_to_those_under_way_and_not_the_end(sft_weights):

    engine = ChatModel.from_pretrained(sft_weights, device="cpu", dtype="float32").engine
    step, stopped = engine.step, []

    async def talk():
        served = api.Api(engine, engine.tokenizer, "m")
        served.service.on_broken = lambda: stopped.append(True)
        driver = asyncio.create_task(served.service.drive())
        transport = httpx.ASGITransport(served.app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            def ask(**more):
                return http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 4} | more)

            def fail():
                engine.step = step if single else fail
                raise RuntimeError("no such kernel")

            single = True
            engine.step = fail
            whole, streamed = await asyncio.gather(ask(), ask(stream=True))
            assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
            assert "no such kernel" not in whole.text + streamed.text  # that is for the log
            assert json.loads(streamed.text.split("\n\n")[1][6:])["error"] == whole.json()["error"]
            assert (await ask()).status_code == 200 and not stopped

            single, engine.step = False, fail
            assert [(await ask()).status_code for _ in range(3)] == [500] * 3
            assert stopped and (await ask()).status_code == (await http.get("/health")).status_code == 503
        await driver

    asyncio.run(talk())


def test_mistakes_on_the_command_line_are_one_line(sft_weights, capsys):
    main = api.main
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127.0.0.1:{port}: Address already in use; give another"):
            main(["--port", str(port), "--weight", str(sft_weights)])
    with pytest.raises(ValueError, match="3-full_sft.py|there are"):
        main(["--port", "0", "--host", "0.0.0.0", "--weight", "nothing"])
    assert capsys.readouterr().err.startswith("warning: whoever reaches 0.0.0.0 can use the model")


def test_the_terminal_client_keeps_the_conversation(server):
    def run(base, text):
        arguments = ["--api_base", base, "--temperature", "0", "--max_tokens", "6", "--api_key", "secret"]
        done = subprocess.run(
            [sys.executable, str(REPO / "chat_openai_api.py"), *arguments], input=text, capture_output=True, text=True
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    code, answers, error = run(server[0] + "/v1", "春 夏？\n春 夏？\n/clear\n春 夏？\n/exit\nnot asked\n")
    assert (code, error, len(answers), answers[2]) == (0, "", 4, "forgotten")
    assert answers[0] == answers[3] != answers[1] and answers[0]
    code, answers, error = run("http://127.0.0.1:1/v1", "hi\n")
    assert (code, answers) == (2, []) and error.startswith("error: no answer from http://127.0.0.1:1/v1; start")
