"""What langchain-openai makes of the server; runs in an environment of its own.

python langchain_client.py BASE_URL KEY LESSONS

LESSONS: a JSON file with what the model has learned, see test_clients.py. Prints a line for each thing that works.
"""

import asyncio
import json
import sys
from pathlib import Path

import openai
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

base_url, key, lessons_file = sys.argv[1:]
lessons = json.loads(Path(lessons_file).read_text(encoding="utf-8"))
chat, call, result, as_json = (lessons[name] for name in ("chat", "call", "result", "json"))
server = {"base_url": base_url, "api_key": key, "max_retries": 0}
name = openai.OpenAI(**server).models.list().data[0].id
model = ChatOpenAI(model=name, temperature=0, stream_usage=True, **server)

reply = model.invoke(chat["messages"])
assert reply.content == chat["reply"], reply
assert reply.response_metadata["finish_reason"] == "stop"
assert reply.usage_metadata["output_tokens"] > 0
print("ok invoke")

pieces = list(model.stream(chat["messages"]))
assert "".join(piece.content for piece in pieces) == chat["reply"] and len(pieces) > 2, pieces
whole = sum(pieces[1:], pieces[0])
for count in ("input_tokens", "output_tokens", "total_tokens"):
    assert whole.usage_metadata[count] == reply.usage_metadata[count], (whole.usage_metadata, reply.usage_metadata)
print("ok stream")


async def several() -> list[str]:
    return [reply.content for reply in await model.abatch([chat["messages"]] * 8)]


assert asyncio.run(several()) == [chat["reply"]] * 8
print("ok abatch")

tooled = model.bind_tools(call["tools"])
first = tooled.invoke(call["messages"])
assert [(c["name"], c["args"]) for c in first.tool_calls] == [(call["name"], call["arguments"])], first
pieces = list(tooled.stream(call["messages"]))
streamed = sum(pieces[1:], pieces[0])
assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["arguments"])], streamed
answer = ToolMessage(result["content"], tool_call_id=first.tool_calls[0]["id"])
assert tooled.invoke([*call["messages"], first, answer]).content == result["reply"]
forced = model.bind_tools(call["tools"], tool_choice=call["name"]).invoke(call["messages"])
assert [c["name"] for c in forced.tool_calls] == [call["name"]], forced
print("ok bind_tools")

structured = model.with_structured_output(None, method="json_mode").invoke(as_json["messages"])
assert structured == json.loads(as_json["reply"]), structured
print("ok json_mode")

assert isinstance(OpenAI(model=name, temperature=0, max_tokens=5, **server).invoke("你好"), str)
print("ok completion")

# check_embedding_ctx_length=False sends text; otherwise OpenAI's own token ids, which mean other words here
embeddings = OpenAIEmbeddings(model=name, check_embedding_ctx_length=False, **server)
rows = embeddings.embed_documents(["你好", "再见"])
assert [abs(sum(x * x for x in row) - 1) < 1e-4 for row in rows] == [True, True]
assert max(abs(a - b) for a, b in zip(embeddings.embed_query("你好"), rows[0], strict=True)) < 1e-5
print("ok embeddings")

for settings, kind in (({"model": "no-such-model"}, openai.NotFoundError), ({"top_p": 7}, openai.BadRequestError)):
    try:
        ChatOpenAI(**{"model": name, **settings}, **server).invoke("你好")
        raise AssertionError(f"{settings} was accepted")
    except kind as error:
        assert error.body["message"], error
print("ok errors")
