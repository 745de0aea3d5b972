"""OpenAI's API: its requests, checked and turned into the engine's, and its answers, whole or as events.

What is accepted works; what is not is refused with an ApiError that names the field. The rules for fields:
- null means absent; the defaults are in the schemas below, which /docs shows.
- Fields of OpenAI's or vLLM's API that would change the answer and are not supported are in REFUSED, with the values
  that change nothing and are let through.
- Accepted though nothing comes of it: user, metadata, safety_identifier, prompt_cache_key, prompt_cache_retention,
  store=false, service_tier auto, a message's name, refusal and annotations.
- Any other field is a client's private one and is ignored.
"""

import base64
import codecs
import json
import math
import struct
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.engine import Engine, Job, Request, TokenLogprob, Update
from model.generate import Sampling
from model.json_mode import JsonConstraint
from model.tokenizer import Tokenizer
from model.tools import (
    STOP,
    CallStart,
    Content,
    Event,
    ToolParser,
    assemble,
    check_tools,
    flatten,
    forced_starts,
    open_reply,
)

# ---------------------------------------------------------------- 1. errors


class ApiError(Exception):
    """What is answered instead of a reply: an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorDetail(BaseModel):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["temperature"], description="the field that is wrong")
    code: str | None = Field(examples=["invalid_value"])


class ErrorResponse(BaseModel):
    error: ErrorDetail


# ---------------------------------------------------------------- 2. schemas


class Schema(BaseModel):
    # strict: "0.5" is no number and 1 is not true, as OpenAI has it
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def tidy(cls, data: Any) -> Any:
        """null is as good as absent, and 1.0 is the whole number 1, as JSON schema has it."""
        if not isinstance(data, dict):
            return data
        whole = {name: int(value) for name, value in data.items() if type(value) is float and value.is_integer()}
        return {name: value for name, value in (data | whole).items() if value is not None}


def list_of(kind: Any, most: int, least: int = 0) -> Any:
    """A list's type. The first fault ends its check: pydantic's report of a million faults takes gigabytes."""
    return Annotated[list[kind], Field(fail_fast=True, min_length=least, max_length=most)]


class Part(Schema):
    type: Literal["text"] = Field(description="images, audio and files need another model")
    text: str


class FunctionCall(Schema):
    name: str
    arguments: str = Field(description="JSON")


class ToolCall(Schema):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list_of(Part, 4096) | None = Field(None, description="parts are joined by a newline")
    name: str | None = Field(None, description="of the function, for the role function; else without effect")
    tool_calls: list_of(ToolCall, 128) | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    audio: None = None


class Function(Schema):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema")
    strict: Literal[False] | None = Field(None, description="arguments are not held to the schema")


class Tool(Schema):
    type: Literal["function"]
    function: Function


class FunctionName(Schema):
    name: str


class ToolName(Schema):
    type: Literal["function"]
    function: FunctionName


class ResponseFormat(Schema):
    type: Literal["text", "json_object"]


class StreamOptions(Schema):
    include_usage: bool | None = Field(False, description="a last chunk tells the usage")
    include_obfuscation: Literal[False] | None = None


Limit = Literal[-1] | Annotated[int, Field(ge=1)] | None
# The streamer compares every beginning of every stop string with the text at each token: hence the bound.
Stop = Annotated[str, Field(min_length=1, max_length=128)]
TokenIds = list_of(Annotated[int, Field(ge=0)], 1 << 20, least=1)
Penalty = Annotated[float, Field(ge=-2, le=2)]
DEFAULT = Sampling()
TOOLS_SHARE = 0.75  # of the context for a prompt with tools that need not be called; a call and an answer need the rest
MAX_BIAS = 1024  # tokens with a bias
AT_MOST = "tokens of a reply at most; -1 or absent: what the context has room for"


class Generation(Schema):
    """What requests for chat and for plain completions have in common."""

    model: str | None = Field(None, description="as /v1/models names it; absent: the one that is served")
    max_tokens: Limit = Field(None, description=AT_MOST)
    temperature: float | None = Field(DEFAULT.temperature, ge=0, le=2, description="0: always the likeliest token")
    top_k: int | None = Field(DEFAULT.top_k, ge=-1, description="of the k likeliest tokens; 0 or -1: of all")
    top_p: float | None = Field(DEFAULT.top_p, gt=0, le=1)
    min_p: float | None = Field(DEFAULT.min_p, ge=0, le=1)
    repetition_penalty: float | None = Field(DEFAULT.repetition_penalty, ge=0.01, le=100)
    repeat_penalty: float | None = Field(None, ge=0.01, le=100, description="Ollama's name of repetition_penalty")
    presence_penalty: Penalty | None = DEFAULT.presence_penalty
    frequency_penalty: Penalty | None = DEFAULT.frequency_penalty
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=MAX_BIAS, description="token id: what is added to its logit")
    )
    seed: int | None = Field(
        None, description="choice i draws from seed + i; absent: one that follows from the server's --seed"
    )
    n: int | None = Field(1, ge=1, description="choices")
    stop: Stop | list_of(Stop, 16) | None = None
    ignore_eos: bool | None = Field(False, description="go on after the end token, up to the limit")
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    user: str | None = Field(None, description="without effect")


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: list_of(Message, 4096, least=1) = Field(
        examples=[[{"role": "user", "content": "你好"}]],
        description="if the last one is an assistant's text, the reply continues it",
    )
    max_completion_tokens: Limit = Field(None, description=f"as max_tokens: {AT_MOST}")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="only with logprobs")
    response_format: ResponseFormat | None = Field(None, description="json_object: the reply is one JSON object")
    tools: list_of(Tool, 128) | None = Field(
        None, description="left out if they fill the context and none must be called: x-tools-left-out"
    )
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = Field(None, description="default: auto")
    parallel_tool_calls: bool | None = Field(True, description="false: one call a reply at most")
    functions: list_of(Function, 128) | None = Field(None, description="what tools were called once")
    function_call: Literal["none", "auto"] | FunctionName | None = None


class CompletionRequest(Generation):
    """POST /v1/completions: goes on with a text, as in pretraining; <s> is put before a text, not before token ids."""

    prompt: str | list_of(str, 2048, least=1) | TokenIds | list_of(TokenIds, 2048, least=1)
    echo: bool | None = Field(False, description="begin the text with the prompt; not with logprobs")
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, description="only equal to n")


class EmbeddingRequest(Schema):
    """POST /v1/embeddings: the mean of the last hidden states of <s> and a text, of length 1."""

    input: (
        Annotated[str, Field(min_length=1)]
        | list_of(Annotated[str, Field(min_length=1)], 2048, least=1)
        | TokenIds
        | list_of(TokenIds, 2048, least=1)
    ) = Field(examples=["你好"])
    model: str | None = Field(None, description="as /v1/models names it; absent: the one that is served")
    encoding_format: Literal["float", "base64"] | None = Field("float", description="base64: of little-endian float32")
    dimensions: int | None = Field(None, ge=1, description="only the model's own")
    user: str | None = Field(None, description="without effect")


REFUSED: dict[str, tuple] = {  # field: values that change nothing
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options", "verbosity"), ()),
    **dict.fromkeys(("prompt_cache_options", "chat_template", "chat_template_kwargs", "documents", "bad_words"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), ()),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "truncate_prompt_tokens", "prompt_logprobs"), ()),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output", "store", "continue_final_message"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "min_tokens": (0,),
    "length_penalty": (1,),
}

S = TypeVar("S", bound=Schema)


def parse(schema: type[S], raw: bytes) -> S:
    """The body of a request, checked. Raises: ApiError 400."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        body = json.loads(raw, parse_constant=refuse_constant)
        if b"\\ud" in raw.lower():  # perhaps half a surrogate pair, as JavaScript makes when it cuts an emoji
            text = json.dumps(body, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
            body = json.loads(text.decode("utf-16-le", "replace"))
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > MAX_BIAS:  # before pydantic looks at each
        raise ApiError(400, f"logit_bias: at most {MAX_BIAS} tokens", "logit_bias", "invalid_value")
    for name, harmless in REFUSED.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            message = f"{name} is not supported by this server; leave it out"
            raise ApiError(400, message, name, "unsupported_parameter")
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise explain(error, body) from None


def explain(error: ValidationError, body: dict) -> ApiError:
    """The deepest of pydantic's complaints: of the forms that a field may have, it is about the one meant."""
    entries = error.errors(include_url=False, include_input=False)
    found = [(field_path(entry["loc"], body, entry["type"] == "missing"), entry) for entry in entries]
    path, first = max(found, key=lambda pair: len(pair[0]))
    reasons = dict.fromkeys(entry["msg"] for other, entry in found if other == path)
    param = ""
    for key in path:
        param += f"[{key}]" if isinstance(key, int) else f".{key}" if param else key
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, f"{param}: {' / '.join(reasons)}", param, code)


def field_path(loc: Sequence[str | int], value: Any, is_missing: bool) -> list[str | int]:
    """Where in the body pydantic complains; its path also holds the names of the forms that it tried."""
    path = []
    for i, key in enumerate(loc):
        if isinstance(value, list) and isinstance(key, int) and key < len(value):
            path.append(key)
            value = value[key]
        elif isinstance(value, dict) and (key in value or (is_missing and i == len(loc) - 1)):
            path.append(key)
            value = value.get(key)
    return path


# ---------------------------------------------------------------- 3. requests to the engine


class ChatPlan(NamedTuple):
    requests: list[Request]
    names: list[str]  # of the functions that may be called
    begun: str  # the beginning of the reply, which the model goes on with
    num_tools_left_out: int  # whose definitions take too much of the context


class Converter:
    """Turns checked requests into the engine's. All methods raise ApiError 400 for what the model cannot do."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer, self.context = engine, tokenizer, engine.max_seq_len
        self.longest_token = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))  # bytes

    def chat(self, body: ChatRequest) -> ChatPlan:
        legacy = body.functions is not None
        self.check_combinations(body)
        messages = [plain_message(message) for message in body.messages]
        definitions = body.functions if legacy else body.tools
        tools = [tool.model_dump(exclude_none=True) for tool in definitions or ()]
        choice = body.function_call if legacy else body.tool_choice
        choice = choice.model_dump() if isinstance(choice, Schema) else choice
        try:
            names = check_tools(tools, choice, legacy)
            flat = flatten(messages, tools, choice, legacy)
        except ValueError as error:
            param, _, _ = str(error).partition(": ")
            raise ApiError(400, str(error), param, "invalid_value") from None

        num_left_out = 0
        if names and choice in (None, "auto"):  # to call none is a choice the model has
            try:
                self.chat_prompt(flat, self.context * TOOLS_SHARE)
            except ApiError:
                names, num_left_out, flat = [], len(tools), flatten(messages)
        prompt = self.chat_prompt(flat, self.context, "messages and tools" if names else "messages")
        starts = forced_starts(names, choice)
        constrained = starts or (body.response_format and body.response_format.type == "json_object")
        make_constraint = (lambda: JsonConstraint(self.tokenizer, starts)) if constrained else lambda: None
        if constrained and body.ignore_eos:
            raise ApiError(400, "ignore_eos: a JSON object must be able to end", "ignore_eos", "invalid_value")
        stop = STOP if names else []
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = self.requests(body, [prompt], "messages", stop, logprobs, make_constraint)
        return ChatPlan(requests, names, open_reply(flat), num_left_out)

    def check_combinations(self, body: ChatRequest) -> None:
        wrong = None
        if body.functions is not None and (body.tools is not None or body.tool_choice is not None):
            wrong = "functions", "it is the old name of tools; send one of the two"
        elif body.function_call is not None and body.functions is None:
            wrong = "function_call", "it needs functions"
        elif body.response_format and body.response_format.type != "text" and (body.tools or body.functions):
            wrong = "response_format", "json_object does not go with tools"
        elif body.top_logprobs is not None and not body.logprobs:
            wrong = "top_logprobs", "it needs logprobs: true"
        if wrong:
            raise ApiError(400, f"{wrong[0]}: {wrong[1]}", wrong[0], "invalid_value")

    def chat_prompt(self, messages: list[dict], limit: float, what: str = "") -> list[int]:
        """The prompt, shorter than the limit; a last assistant message is left open, to be continued."""
        self.check_size(sum(len(message["content"].encode()) for message in messages), "messages", limit, what)
        if messages[-1]["role"] == "user":
            prompt = self.tokenizer.encode_chat(messages)
        else:
            prompt = self.tokenizer.encode_chat(messages[:-1]) + self.tokenizer.encode(open_reply(messages))
        if len(prompt) >= limit:
            raise self.too_long(f"{len(prompt)}", "messages", what)
        return prompt

    def completion(self, body: CompletionRequest) -> list[Request]:
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo: it does not go with logprobs", "echo", "invalid_value")
        if body.best_of not in (None, body.n):
            raise ApiError(400, "best_of: only equal to n is supported", "best_of", "invalid_value")
        prompts = self.prompts(body.prompt, "prompt")
        for prompt in prompts:
            if len(prompt) >= self.context:
                raise self.too_long(f"{len(prompt)}", "prompt")
        return self.requests(body, prompts, "prompt", [], body.logprobs)

    def embeddings(self, body: EmbeddingRequest) -> list[Request]:
        dim = self.engine.model.config.dim
        if body.dimensions not in (None, dim):
            raise ApiError(400, f"dimensions: the model's embeddings have {dim}", "dimensions", "invalid_value")
        prompts = self.prompts(body.input, "input")
        for prompt in prompts:
            if len(prompt) > self.context:
                raise self.too_long(f"{len(prompt)}", "input")
        return [Request(prompt, embed=True) for prompt in prompts]

    def prompts(self, given: str | list, param: str) -> list[list[int]]:
        """The token ids of one text or list of ids, or of several."""
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        prompts = []
        for one in several:
            if isinstance(one, str):
                self.check_size(len(one.encode()), param, self.context)
                prompts.append([self.tokenizer.bos_id, *self.tokenizer.encode(one)])
            elif max(one) >= self.tokenizer.vocab_size:
                message = f"{param}: there is no token {max(one)}; the vocabulary has {self.tokenizer.vocab_size}"
                raise ApiError(400, message, param, "invalid_value")
            else:
                prompts.append(one)
        return prompts

    def requests(
        self,
        body: Generation,
        prompts: list[list[int]],
        param: str,
        stop: list[str],
        logprobs: int | None,
        make_constraint=lambda: None,
    ) -> list[Request]:
        """n requests for every prompt."""
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options: only with stream: true", "stream_options", "invalid_value")
        most = self.engine.max_batch + self.engine.max_queue
        if len(prompts) * body.n > most:
            name = "n" if body.n > 1 else param
            raise ApiError(400, f"{name}: one request can have {most} replies at most", name, "invalid_value")
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        if bias and max(bias) >= self.tokenizer.vocab_size:
            message = f"logit_bias: there is no token {max(bias)}; the vocabulary has {self.tokenizer.vocab_size}"
            raise ApiError(400, message, "logit_bias", "invalid_value")
        sampling = {name: getattr(body, name) for name in vars(DEFAULT)}
        if body.repeat_penalty is not None and "repetition_penalty" not in body.model_fields_set:
            sampling["repetition_penalty"] = body.repeat_penalty
        sampling |= {"top_k": min(max(body.top_k, 0), self.tokenizer.vocab_size), "logit_bias": bias}
        limits = [body.max_tokens, getattr(body, "max_completion_tokens", None)]
        limit = min([limit for limit in limits if limit not in (None, -1)], default=self.context)
        asked_stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        requests = []
        for prompt in prompts:
            for _ in range(body.n):
                seed = None if body.seed is None else (body.seed + len(requests)) % 2**63
                requests.append(
                    Request(
                        prompt,
                        max_new_tokens=min(limit, self.context - len(prompt)),
                        sampling=Sampling(**sampling | {"seed": seed}),
                        stop=[*asked_stop, *stop],
                        logprobs=logprobs,
                        constraint=make_constraint(),
                        eos_id=None if body.ignore_eos else self.tokenizer.eos_id,
                    )
                )
        return requests

    def check_size(self, num_bytes: int, param: str, limit: float, what: str = "") -> None:
        """Refuses what cannot fit, without the work of tokenizing it."""
        if (least := math.ceil(num_bytes / self.longest_token)) >= limit:
            raise self.too_long(f"at least {least}", param, what)

    def too_long(self, tokens: str, param: str, what: str = "") -> ApiError:
        return ApiError(
            400,
            f"the {what or param} make {tokens} tokens, too many for a context of {self.context} tokens: send "
            f"fewer or shorter ones, or start the server with a larger --max_seq_len",
            param,
            "context_length_exceeded",
        )


def plain_message(message: Message) -> dict:
    """A message as tools.flatten takes it; an assistant's without content has an empty one."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    elif message.role == "assistant":
        plain["content"] = message.content or ""
    return plain


# ---------------------------------------------------------------- 4. answers


class Answer:
    """What a request gets, whole or as server-sent events, with a choice for each of its jobs.

    Subclasses have: contents(index, update), what the events for an update hold, as pairs of JSON (content of the
    choice, log-probabilities); choice(index, job), a finished choice; begin(), the events before the first update.
    """

    def __init__(self, body: ChatRequest | CompletionRequest, jobs: list[Job], tokenizer: Tokenizer, about: dict):
        self.body, self.jobs, self.tokenizer = body, jobs, tokenizer
        self.head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "object": self.kind, "created": int(time.time())}
        self.head |= about  # the model's name, and its fingerprint
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        # All but the text is the same in every event: it is put together once.
        self.before = "data: " + dumps(self.head | {"object": self.event_kind})[:-1] + ',"choices":['
        self.after = ('],"usage":null' if self.with_usage else "]") + "}\n\n"

    def event(self, index: int, content: str, logprobs: str = "null", reason: str = "null") -> str:
        choice = f'{{"index":{index},{content},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return f"{self.before}{choice}{self.after}"

    def events(self, index: int, update: Update) -> str:
        text = "".join(self.event(index, *pair) for pair in self.contents(index, update))
        if update.finish_reason:
            text += self.event(index, self.empty, reason=f'"{self.finish_reason(index, update.finish_reason)}"')
        return text

    async def stream(self, news: AsyncIterator[dict[int, Update]]) -> AsyncIterator[bytes]:
        """Yields the events for what comes from the jobs; those that come together go out together."""
        try:
            yield self.begin().encode()
            async for updates in news:
                if text := "".join(self.events(index, update) for index, update in updates.items()):
                    yield text.encode()
            if self.with_usage:
                yield f"{self.before}],{dumps({'usage': self.usage()})[1:]}\n\n".encode()
        except ApiError as error:
            yield f"data: {dumps(error.body)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    def whole(self) -> dict:
        choices = [self.choice(index, job) for index, job in enumerate(self.jobs)]
        return self.head | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict:
        """Tokens; a prompt with n choices counts once."""
        prompts = self.jobs[:: self.body.n]
        prompt_tokens = sum(job.prompt_tokens for job in prompts)
        completion_tokens = sum(job.completion_tokens for job in self.jobs)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in prompts)},
        }

    def finish_reason(self, index: int, reason: str) -> str:
        return reason


class ChatAnswer(Answer):
    kind, event_kind, id_prefix, empty = "chat.completion", "chat.completion.chunk", "chatcmpl", '"delta":{}'

    def __init__(self, body: ChatRequest, jobs: list[Job], tokenizer: Tokenizer, about: dict, plan: ChatPlan):
        super().__init__(body, jobs, tokenizer, about)
        self.legacy = body.functions is not None
        self.parsers: list[ToolParser] = []  # one for each choice, if the text is not simply the content
        if plan.names or plan.begun:
            parallel = body.parallel_tool_calls and not self.legacy
            self.parsers = [ToolParser(plan.names, plan.begun, parallel=parallel) for _ in jobs]

    def begin(self) -> str:
        delta = '"delta":{"role":"assistant","content":""}'
        return "".join(self.event(index, delta) for index in range(len(self.jobs)))

    def contents(self, index: int, update: Update) -> list[tuple[str, str]]:
        logprobs = dumps(self.logprobs(update.logprobs)) if update.logprobs else "null"
        events = self.parse(index, update.text, bool(update.finish_reason))
        deltas = [f'"delta":{self.delta(event)}' for event in events]
        if update.logprobs and not deltas:
            deltas = [self.empty]
        return [(delta, "null" if i else logprobs) for i, delta in enumerate(deltas)]

    def parse(self, index: int, text: str, is_last: bool) -> list[Event]:
        if not self.parsers:
            return [Content(text)] if text else []
        parser = self.parsers[index]
        return parser.feed(text) + (parser.finish() if is_last else [])

    def delta(self, event: Event) -> str:
        if isinstance(event, Content):
            return f'{{"content":{quote(event.text)}}}'
        if isinstance(event, CallStart):
            function, call = {"name": event.name, "arguments": ""}, {"id": event.id, "type": "function"}
        else:
            function, call = {"arguments": event.text}, {}
        if self.legacy:
            return dumps({"function_call": function})
        return dumps({"tool_calls": [{"index": event.index, **call, "function": function}]})

    def finish_reason(self, index: int, reason: str) -> str:
        if reason == "stop" and self.parsers and self.parsers[index].calls:
            return "function_call" if self.legacy else "tool_calls"
        return reason

    def choice(self, index: int, job: Job) -> dict:
        content, calls = assemble(self.parse(index, job.text, is_last=True))
        message: dict = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message |= {"function_call": calls[0]["function"]} if self.legacy else {"tool_calls": calls}
        logprobs = self.logprobs(job.logprobs) if self.body.logprobs else None
        reason = self.finish_reason(index, job.finish_reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, logprobs: list[TokenLogprob]) -> dict:
        def entry(token_id: int, logprob: float) -> dict:
            raw = self.tokenizer.token_bytes(token_id)
            return {"token": token_text(self.tokenizer, token_id), "logprob": logprob, "bytes": list(raw) or None}

        content = [entry(one.id, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]} for one in logprobs]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    kind = event_kind = "text_completion"
    id_prefix, empty = "cmpl", '"text":""'

    def __init__(self, body: CompletionRequest, jobs: list[Job], tokenizer: Tokenizer, about: dict):
        super().__init__(body, jobs, tokenizer, about)
        self.offsets = [0] * len(jobs)  # characters of the tokens told so far
        self.decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in jobs]

    def prompt(self, job: Job) -> str:
        return self.tokenizer.decode(job.request.prompt) if self.body.echo else ""

    def begin(self) -> str:
        prompts = enumerate(map(self.prompt, self.jobs))
        return "".join(self.event(index, f'"text":{quote(prompt)}') for index, prompt in prompts if prompt)

    def contents(self, index: int, update: Update) -> list[tuple[str, str]]:
        if not update.text and not update.logprobs:
            return []
        logprobs = dumps(self.logprobs(index, update.logprobs)) if update.logprobs else "null"
        return [(f'"text":{quote(update.text)}', logprobs)]

    def choice(self, index: int, job: Job) -> dict:
        logprobs = None if self.body.logprobs is None else self.logprobs(index, job.logprobs)
        text = self.prompt(job) + job.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": job.finish_reason}

    def logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict:
        offsets = []
        for one in logprobs:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(self.decoders[index].decode(self.tokenizer.token_bytes(one.id)))
        return {
            "tokens": [token_text(self.tokenizer, one.id) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{token_text(self.tokenizer, i): value for i, value in one.top} for one in logprobs],
            "text_offset": offsets,
        }


def embedding_answer(body: EmbeddingRequest, jobs: list[Job], name: str) -> dict:
    def entry(index: int, vector: list[float]) -> dict:
        if body.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        return {"object": "embedding", "index": index, "embedding": vector}

    tokens = sum(job.prompt_tokens for job in jobs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    data = [entry(index, job.embedding) for index, job in enumerate(jobs)]
    return {"object": "list", "data": data, "model": name, "usage": usage}


def dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def quote(text: str) -> str:
    """The text as a JSON string, readable; all ASCII if it holds what some clients take for the end of a line."""
    odd = "\u2028" in text or "\u2029" in text or "\x85" in text
    return encode_basestring_ascii(text) if odd else encode_basestring(text)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """As OpenAI writes it: a part of a character as bytes:\\xe4."""
    if token_id in tokenizer.special_ids:
        return tokenizer.special_tokens[tokenizer.special_ids.index(token_id)]
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
