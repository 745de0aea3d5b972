// What the openai npm client makes of the server. Run from a folder with node_modules/openai:
//   node openai_client.mjs BASE_URL KEY LESSONS
// LESSONS: a JSON file with what the model has learned, see test_clients.py. Prints a line for each thing that works.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [baseURL, apiKey, lessonsFile] = process.argv.slice(2);
const { chat, call, result } = JSON.parse(readFileSync(lessonsFile, "utf8"));
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const model = (await client.models.list()).data[0].id;
const greedy = { model, temperature: 0 };

async function works(name, body) {
  await body();
  console.log(`ok ${name}`);
}

function fails(promise, kind, status, param) {
  return assert.rejects(promise, (error) => {
    assert.ok(error instanceof kind, `${error}`);
    assert.equal(error.status, status);
    if (param !== undefined) assert.equal(error.param, param);
    assert.ok(error.error.message && error.error.type);
    return true;
  });
}

await works("chat", async () => {
  const reply = await client.chat.completions.create({ ...greedy, messages: chat.messages });
  assert.equal(reply.object, "chat.completion");
  assert.equal(reply.choices[0].message.content, chat.reply);
  assert.equal(reply.choices[0].finish_reason, "stop");
  assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
  const parts = chat.messages.map(({ role, content }) => ({ role, content: [{ type: "text", text: content }] }));
  const same = await client.chat.completions.create({ ...greedy, messages: parts, n: 2 });
  assert.deepEqual(same.choices.map((choice) => choice.message.content), [chat.reply, chat.reply]);
});

await works("stream", async () => {
  const stream = await client.chat.completions.create({
    ...greedy, messages: chat.messages, stream: true, stream_options: { include_usage: true },
  });
  let text = "", finish, usage;
  const ids = new Set();
  for await (const chunk of stream) {
    ids.add(chunk.id);
    assert.equal(chunk.object, "chat.completion.chunk");
    text += chunk.choices[0]?.delta.content ?? "";
    finish = chunk.choices[0]?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, chat.reply);
  assert.equal(finish, "stop");
  assert.equal(ids.size, 1);
  assert.ok(usage.completion_tokens > 0);
  const helper = client.chat.completions.stream({ ...greedy, messages: chat.messages });
  assert.equal(await helper.finalContent(), chat.reply);
});

await works("stop reading a stream", async () => {
  const stream = await client.chat.completions.create({ ...greedy, messages: chat.messages, stream: true });
  for await (const chunk of stream) if (chunk.choices[0]?.delta.content) break;
  assert.ok(stream.controller.signal.aborted);
});

const tooled = { ...greedy, messages: call.messages, tools: call.tools };
const askedFor = ({ type, function: f }) => [type, f.name, JSON.parse(f.arguments)];
const expected = ["function", call.name, call.arguments];

await works("tools", async () => {
  const first = (await client.chat.completions.create(tooled)).choices[0];
  assert.equal(first.finish_reason, "tool_calls");
  assert.deepEqual(first.message.tool_calls.map(askedFor), [expected]);
  const answer = { role: "tool", tool_call_id: first.message.tool_calls[0].id, content: result.content };
  const messages = [...call.messages, first.message, answer];
  const last = (await client.chat.completions.create({ ...tooled, messages })).choices[0];
  assert.equal(last.message.content, result.reply);
  assert.equal(last.finish_reason, "stop");
});

await works("tools streamed", async () => {
  const reply = await client.chat.completions.stream(tooled).finalChatCompletion();
  assert.equal(reply.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(reply.choices[0].message.tool_calls.map(askedFor), [expected]);
});

await works("tools run by the client", async () => {
  const asked = [];
  const tools = call.tools.map((tool) => ({
    ...tool,
    function: { ...tool.function, parse: JSON.parse, function: (a) => (asked.push(a), result.content) },
  }));
  const runner = client.chat.completions.runTools({ ...tooled, tools });
  assert.equal(await runner.finalContent(), result.reply);
  assert.deepEqual(asked, [call.arguments]);
});

await works("a forced tool", async () => {
  const choice = { type: "function", function: { name: call.name } };
  const reply = await client.chat.completions.create({ ...tooled, tool_choice: choice });
  assert.equal(reply.choices[0].message.tool_calls[0].function.name, call.name);
});

await works("logprobs", async () => {
  const reply = await client.chat.completions.create({
    ...greedy, messages: chat.messages, logprobs: true, top_logprobs: 3,
  });
  const tokens = reply.choices[0].logprobs.content;
  assert.equal(Buffer.concat(tokens.map((token) => Buffer.from(token.bytes))).toString(), chat.reply);
  for (const token of tokens) {
    assert.equal(token.top_logprobs.length, 3);
    assert.equal(token.top_logprobs[0].logprob, token.logprob); // greedy: the likeliest is what was taken
    assert.ok(token.logprob <= 0);
  }
});

await works("json mode", async () => {
  const reply = await client.chat.completions.create({
    ...greedy, messages: chat.messages, response_format: { type: "json_object" }, max_tokens: 200,
  });
  if (reply.choices[0].finish_reason === "stop") JSON.parse(reply.choices[0].message.content);
  else assert.equal(reply.choices[0].message.content[0], "{");
});

await works("completions", async () => {
  const reply = await client.completions.create({ ...greedy, prompt: "你好", max_tokens: 5, seed: 1 });
  assert.equal(reply.object, "text_completion");
  assert.equal(typeof reply.choices[0].text, "string");
  assert.ok(reply.usage.completion_tokens <= 5);
});

await works("embeddings", async () => {
  const input = ["你好", "再见", "你好"]; // without encoding_format, this client asks for base64 and decodes it
  const packed = (await client.embeddings.create({ model, input })).data.map((row) => row.embedding);
  const plain = (await client.embeddings.create({ model, input, encoding_format: "float" })).data;
  for (const [i, row] of plain.entries()) {
    assert.equal(row.index, i);
    assert.ok(Math.abs(Math.hypot(...row.embedding) - 1) < 1e-4);
    assert.ok(row.embedding.every((x, k) => Math.abs(x - packed[i][k]) < 1e-6));
  }
  assert.notDeepEqual(packed[0], packed[1]);
});

await works("errors", async () => {
  const say = (more) => client.chat.completions.create({ ...greedy, messages: chat.messages, ...more });
  await fails(say({ model: "no-such-model" }), OpenAI.NotFoundError, 404);
  await fails(say({ temperature: 9 }), OpenAI.BadRequestError, 400, "temperature");
  await fails(say({ messages: [] }), OpenAI.BadRequestError, 400, "messages");
  await fails(say({ messages: [{ role: "user", content: "长".repeat(9999) }] }), OpenAI.BadRequestError, 400);
  await fails(say({ temperature: 9, stream: true }), OpenAI.BadRequestError, 400, "temperature");
  await fails(client.models.retrieve("no-such-model"), OpenAI.NotFoundError, 404);
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await fails(stranger.models.list(), OpenAI.AuthenticationError, 401);
});
