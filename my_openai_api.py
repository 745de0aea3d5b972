"""Serves a model over HTTP with OpenAI's API, for Open-WebUI, FastGPT, LangChain and the openai packages.

Reads   out/full_sft_{dim}[_moe].pth, or another with --weight, or a Hugging Face folder with --model_dir
Writes  nothing
Run     python my_openai_api.py                                   http://127.0.0.1:8000/v1, described at /docs
        python my_openai_api.py --weight rl --size tiny --port 8100
        python my_openai_api.py --lora identity                   with an adapter of 4-lora_sft.py
        MINIMIND_API_KEY=secret python my_openai_api.py --host 0.0.0.0     for other machines, with a key
Try     python chat_openai_api.py
        curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "你好"}]}'
Stop    Ctrl-C or SIGTERM: replies under way are finished; a second time: at once

以 OpenAI 接口提供模型服务，供 Open-WebUI、FastGPT、LangChain 与各种 openai 客户端使用。
读入    out/full_sft_{dim}[_moe].pth，或用 --weight 指定，或用 --model_dir 指定 Hugging Face 目录
写出    无
运行    python my_openai_api.py（地址 http://127.0.0.1:8000/v1，说明见 /docs）
        python my_openai_api.py --weight rl --size tiny --port 8100
        python my_openai_api.py --lora identity（加上 4-lora_sft.py 训练的适配器）
        MINIMIND_API_KEY=secret python my_openai_api.py --host 0.0.0.0（供其他机器使用，需要密钥）
试用    python chat_openai_api.py
停止    Ctrl-C 或 SIGTERM：先答完正在生成的回复；再按一次立即退出

One thread does everything: the event loop takes requests, runs the engine's next step, and writes what came of it.
"""

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from urllib.parse import urlsplit

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from model.chat import ChatModel
from model.checkpoint import find_adapters, find_weights
from model.cli import add_lora_flag, add_place_flags, number, positive_int, run_main
from model.engine import Engine, Job, QueueFull, Update
from model.LMConfig import SIZES
from model.protocol import (
    Answer,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Converter,
    EmbeddingRequest,
    ErrorResponse,
    S,
    embedding_answer,
    parse,
)
from model.tokenizer import Tokenizer

MAX_BODY = 4 << 20  # bytes; a context of 100,000 tokens takes a tenth of it
TURNS = 4  # of the event loop after a step: a new request needs some to be accepted, read and queued
MAX_FAULTS = 3  # steps of the engine that fail one after another, before the server gives up
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that none is closed under a new request
FINISH_SECONDS = 60  # that replies under way get at the end
STALL_SECONDS = 30  # that a client may take to send its body, or to read an event
LOG_LEVELS = ("debug", "info", "warning", "error")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/health", "/metrics")

log = logging.getLogger("minimind")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of the machine (default: 127.0.0.1)")
    add("--port", type=number(int, 0, 65535), default=8000, help="0: any free one (default: 8000)")
    add("--weight", default="full_sft", help="pretrain, full_sft or rl in --out_dir, or a .pth (default: full_sft)")
    add("--size", choices=SIZES, default="small", help="model size, for the file's name (default: small)")
    add("--n_heads", type=positive_int, help="query heads of a .pth without .json (default: 16, as all of v1)")
    add("--model_dir", help="a Hugging Face folder with a Llama model, instead of --weight")
    add("--served_model_name", help="the name that clients ask for (default: the file's, e.g. full_sft_512)")
    add("--max_seq_len", type=number(int, 16), help="tokens of prompt and reply (default: what it was trained on)")
    add("--max_batch", type=positive_int, default=16, help="replies computed at once (default: 16)")
    add("--max_queue", type=positive_int, default=64, help="replies that may wait for that (default: 64)")
    add("--api_key", help="that clients must send; better in MINIMIND_API_KEY, which `ps` does not show")
    add("--cors_origin", nargs="+", default=[], help="web pages that may call, e.g. https://chat.example; '*': all")
    add("--log_level", choices=LOG_LEVELS, default="info", help="debug: requests with their text (default: info)")
    add_lora_flag(parser)
    add_place_flags(parser)
    parser.set_defaults(tokenizer_dir=None)  # the folder of --model_dir brings its own
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(args.log_level.upper())
    api_key = args.api_key or os.environ.get("MINIMIND_API_KEY")
    if args.host not in LOCAL_HOSTS and not api_key:
        print(f"warning: whoever reaches {args.host} can use the model; set MINIMIND_API_KEY", file=sys.stderr)
    random.seed(args.seed)  # seeds of the requests that bring none

    listener = listen(args.host, args.port)
    path = args.model_dir or find_weights(args.weight, args.out_dir, args.size)
    adapters = find_adapters(args.lora, args.out_dir, args.size)
    settings = {"device": args.device, "dtype": args.dtype, "max_batch": args.max_batch, "max_queue": args.max_queue}
    settings |= {"n_heads": args.n_heads, "max_seq_len": args.max_seq_len, "tokenizer_dir": args.tokenizer_dir}
    model = ChatModel.from_pretrained(path, lora=adapters, **settings)
    print(model.summary, file=sys.stderr)

    name = args.served_model_name or model.name
    api = Api(model.engine, model.tokenizer, name, api_key, str(model.about.get("sha256")))
    seconds = {"timeout_keep_alive": KEEP_ALIVE_SECONDS, "timeout_graceful_shutdown": FINISH_SECONDS}
    app = api.app(args.cors_origin, only_local=args.host in LOCAL_HOSTS and not api_key)
    server = Server(uvicorn.Config(app, log_config=None, log_level=args.log_level, ws="none", **seconds))
    api.service.on_broken = lambda: setattr(server, "should_exit", True)
    server.run([listener])
    return 1 if api.service.broken else 0


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before the model is loaded. Raises: ValueError if it is taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        return listener
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port") from None


class Server(uvicorn.Server):
    """uvicorn, but a signal that ended it well is exit code 0, and the second signal of any kind ends it at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        print(
            f"serving at http://{f'[{host}]' if ':' in host else host}:{port}/v1, described at /docs", file=sys.stderr
        )

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # nothing is lost: the server writes no files
        self.should_exit = True


# ---------------------------------------------------------------- 1. the engine in the event loop


class Service:
    """Runs the engine's steps, and brings what comes of them to the requests that wait for it."""

    def __init__(self, engine: Engine, metrics: "Metrics"):
        self.engine, self.metrics = engine, metrics
        self.work = asyncio.Event()
        self.open: set[Replies] = set()
        self.broken, self.on_broken = False, lambda: None

    def submit(self, requests: Sequence) -> "Replies":
        """Raises: ApiError 503 if the queue has no room for all of them."""
        if self.broken:
            raise ApiError(503, "the engine has failed; the server is about to end")
        replies = Replies(self)
        try:
            for i, request in enumerate(requests):
                replies.jobs.append(self.engine.submit(request, partial(replies.update, i)))
        except QueueFull as error:
            replies.cancel()
            raise ApiError(503, str(error), code="queue_full", retry_after="1") from None
        self.open.add(replies)
        self.work.set()
        return replies

    async def drive(self) -> None:
        faults = 0
        while True:
            if not self.engine.busy:
                self.work.clear()
                await self.work.wait()
            try:
                self.engine.step()
                faults = 0
            except Exception:
                log.exception("a step of the engine failed; all requests under way end with an error")
                faults += 1
                self.fail(faults >= MAX_FAULTS)
                if self.broken:
                    return self.on_broken()
            for _ in range(TURNS):
                await asyncio.sleep(0)

    def fail(self, broken: bool) -> None:
        """Ends all requests with an error; the engine starts anew, unless it has failed too often."""
        self.broken = broken
        for replies in list(self.open):
            replies.fail(ApiError(500, "the model failed to compute the reply; the server's log says why"))
        try:
            self.engine.cancel_all()
        except Exception:
            log.exception("the engine cannot go on")
            self.broken = True


class Replies:
    """The jobs of one HTTP request, and the news of them; news that nobody took yet are put together."""

    def __init__(self, service: Service):
        self.service = service
        self.jobs: list[Job] = []
        self.waiting: dict[int, Update] = {}  # by the job's number
        self.ready, self.done = asyncio.Event(), asyncio.Event()
        self.num_ended = 0
        self.error: ApiError | None = None
        self.is_cancelled = False

    def update(self, index: int, job: Job, update: Update) -> None:
        """Takes the news of a job from the engine."""
        if before := self.waiting.get(index):
            update = update._replace(text=before.text + update.text, logprobs=before.logprobs + update.logprobs)
        self.waiting[index] = update
        self.ready.set()
        if update.finish_reason:
            self.num_ended += 1
            self.service.metrics.observe(job)
            if self.num_ended == len(self.jobs):
                self.done.set()

    async def news(self) -> AsyncIterator[dict[int, Update]]:
        """Yields what came for every job since the last time. Raises: ApiError if the engine failed."""
        while self.num_ended < len(self.jobs) or self.waiting:
            await self.ready.wait()
            self.ready.clear()
            if self.error:
                raise self.error
            waiting, self.waiting = self.waiting, {}
            yield waiting

    async def finish(self, receive) -> None:
        """Waits for all jobs, as long as the client does. Raises: ApiError, ClientDisconnect."""
        with self.watch(receive):
            await self.done.wait()
        if self.error:
            raise self.error
        if self.is_cancelled:
            raise ClientDisconnect

    @contextlib.contextmanager
    def watch(self, receive) -> Iterator[None]:
        """While in it, a client that disconnects ends the jobs at once; at the end they end in any case."""

        async def until_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.is_cancelled = True
            self.cancel()

        watcher = asyncio.create_task(until_disconnect())
        try:
            yield
        finally:
            watcher.cancel()
            self.cancel()

    def fail(self, error: ApiError) -> None:
        self.error = error
        self.ready.set()
        self.done.set()

    def cancel(self) -> None:
        self.service.open.discard(self)
        for job in self.jobs:
            self.service.engine.cancel(job)


# ---------------------------------------------------------------- 2. the API


class EventStream(StreamingResponse):
    """Server-sent events; a client that goes away ends its jobs."""

    def __init__(self, replies: Replies, answer: Answer):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the latter tells nginx not to hold it back
        super().__init__(answer.stream(replies.news()), media_type="text/event-stream", headers=headers)
        self.replies = replies

    async def __call__(self, scope, receive, send) -> None:
        async def send_in_time(message: dict) -> None:
            async with asyncio.timeout(STALL_SECONDS):  # a client that reads nothing must not hold a slot
                await send(message)

        with self.replies.watch(receive), contextlib.suppress(TimeoutError):
            await self.stream_response(send_in_time)


class Api:
    """The endpoints."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, api_key: str | None = None, weights: str = ""):
        """weights: what tells these weights from others, for system_fingerprint."""
        self.engine, self.tokenizer, self.name, self.api_key = engine, tokenizer, name, api_key
        self.created = int(time.time())
        fingerprint = hashlib.sha256(f"{name} {weights} {torch.__version__}".encode()).hexdigest()[:12]
        self.about = {"model": name, "system_fingerprint": f"fp_{fingerprint}"}
        self.metrics = Metrics(engine)
        self.service = Service(engine, self.metrics)
        self.convert = Converter(engine, tokenizer)

    async def chat(self, request: Request) -> Response:
        body = await self.read(request, ChatRequest)
        plan = self.convert.chat(body)
        replies = self.service.submit(plan.requests)
        answer = ChatAnswer(body, replies.jobs, self.tokenizer, self.about, plan)
        response = await self.respond(request, replies, answer)
        if count := plan.num_tools_left_out:
            self.metrics.tools_left_out += count
            response.headers["x-tools-left-out"] = str(count)
            log.info(
                "%d tools left out: their definitions fill the context of %d tokens", count, self.engine.max_seq_len
            )
        return response

    async def completions(self, request: Request) -> Response:
        body = await self.read(request, CompletionRequest)
        replies = self.service.submit(self.convert.completion(body))
        return await self.respond(request, replies, CompletionAnswer(body, replies.jobs, self.tokenizer, self.about))

    async def respond(self, request: Request, replies: Replies, answer: Answer) -> Response:
        if answer.body.stream:
            return EventStream(replies, answer)
        await replies.finish(request.receive)
        return JSONResponse(answer.whole())

    async def embeddings(self, request: Request) -> Response:
        body = await self.read(request, EmbeddingRequest)
        requests, jobs = self.convert.embeddings(body), []
        for start in range(0, len(requests), self.engine.max_batch):  # a long list must not fill the queue
            part = requests[start : start + self.engine.max_batch]
            while (replies := self.submit_part(part, may_wait=start > 0)) is None:
                if await request.is_disconnected():
                    raise ClientDisconnect
                await asyncio.sleep(0.01)
            await replies.finish(request.receive)
            jobs += replies.jobs
        return JSONResponse(embedding_answer(body, jobs, self.name))

    def submit_part(self, requests: Sequence, may_wait: bool) -> "Replies | None":
        """None if the queue is full and the request is one that may wait: what it has done would be lost."""
        try:
            return self.service.submit(requests)
        except ApiError as error:
            if may_wait and error.body["error"]["code"] == "queue_full":
                return None
            raise

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self.model_card()]})

    async def model(self, model: str) -> Response:
        self.check_model(model)
        return JSONResponse(self.model_card())

    async def health(self) -> Response:
        return JSONResponse({"status": "failed" if self.service.broken else "ok"}, 503 if self.service.broken else 200)

    async def show_metrics(self) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model_card(self) -> dict:
        about = {"created": self.created, "owned_by": "minimind", "max_model_len": self.engine.max_seq_len}
        return {"id": self.name, "object": "model"} | about

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(404, f"there is no model {name!r} here, only {self.name!r}", "model", "model_not_found")

    async def read(self, request: Request, schema: type[S]) -> S:
        """The checked body; one over the limit is refused before it is parsed, if it says so before it has come."""
        size, body = request.headers.get("content-length", "0"), bytearray()
        too_large = ApiError(413, f"the body is over {MAX_BODY} bytes", code="body_too_large")
        if size.isdigit() and int(size) > MAX_BODY:
            raise too_large
        try:
            async with asyncio.timeout(STALL_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_BODY:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body has not come within {STALL_SECONDS} seconds", connection="close") from None
        log.debug("%s %s", request.url.path, body.decode(errors="replace"))
        checked = parse(schema, bytes(body))
        self.check_model(checked.model)
        return checked

    def app(self, cors_origins: Sequence[str] = (), only_local: bool = False) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            driver = asyncio.create_task(self.service.drive())
            yield
            driver.cancel()

        app = FastAPI(title="MiniMind", description=__doc__.split("\n")[0], lifespan=lifespan, redoc_url=None)
        describe(app, self)
        app.add_middleware(Gate, api=self, origins=cors_origins, only_local=only_local)
        if cors_origins:
            app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
        for kind in (ApiError, HTTPException, ClientDisconnect, RecursionError, Exception):
            app.add_exception_handler(kind, error_response)
        return app


async def error_response(request: Request, error: Exception) -> Response:
    """OpenAI's error object for whatever went wrong; uvicorn logs the traceback of what is not the client's fault."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # for the metrics: nobody reads it
    if isinstance(error, HTTPException):  # no such path, or not with this method
        message = f"{error.detail}: {request.method} {request.url.path}"
        error = ApiError(error.status_code, message, **error.headers or {})
    elif isinstance(error, RecursionError):
        error = ApiError(400, "the body is nested too deeply", code="invalid_json")
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed; its log says why")
    return JSONResponse(error.body, error.status, error.headers)


class Gate:
    """Turns away who lacks the key, and web pages that may not call; counts requests.

    A browser lets any page send a simple request to this machine: it says so in Origin. By a name of its own that
    leads here (DNS rebinding) a page could also read the answer: without a key only local names are taken.
    """

    def __init__(self, app, api: Api, origins: Sequence[str], only_local: bool):
        self.app, self.metrics, self.origins, self.only_local = app, api.metrics, origins, only_local
        self.key = api.api_key.encode() if api.api_key else None

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        wrong_key = self.key and not hmac.compare_digest(given.strip(), self.key)
        if path.startswith("/v1") and (wrong_key or (self.key and kind.lower() != b"bearer")):
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", www_authenticate="Bearer")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.only_local and urlsplit(f"//{host}").hostname not in LOCAL_HOSTS:
            return ApiError(403, f"without an API key the server answers to local names only, not to {host!r}")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & set(self.origins):
            return ApiError(403, f"pages from {origin} may not call; start the server with --cors_origin {origin}")
        return None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500

        async def count(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path, app = scope["path"], self.app
        if error := self.refusal(path, dict(scope["headers"])):
            app = JSONResponse(error.body, error.status, error.headers)
        try:
            await app(scope, receive, count)
        finally:
            path = "/v1/models" if path.startswith("/v1/models/") else path
            self.metrics.requests[path if path in PATHS else "other", status] += 1


def describe(app: FastAPI, api: Api) -> None:
    """Adds the routes, and what /docs says of them."""
    meanings = {
        400: "a field is wrong, or the prompt exceeds the context; param names the field",
        401: "the API key is missing or wrong",
        403: "called from a web page that may not",
        404: "no such model",
        408: f"the body has not come within {STALL_SECONDS} seconds",
        413: f"the body is over {MAX_BODY} bytes",
        500: "a fault of the server",
        503: "the queue is full; Retry-After says when to come again",
    }
    errors = {status: {"model": ErrorResponse, "description": text} for status, text in meanings.items()}
    if not api.api_key:
        del errors[401]
    posts = (
        ("/v1/chat/completions", api.chat, ChatRequest),
        ("/v1/completions", api.completions, CompletionRequest),
        ("/v1/embeddings", api.embeddings, EmbeddingRequest),
    )
    for path, endpoint, schema in posts:
        ok = {"description": "OpenAI's object", "content": {"application/json": {"schema": {"type": "object"}}}}
        if schema is not EmbeddingRequest:
            ok["description"] += "; with stream: true, events of them"
            ok["content"]["text/event-stream"] = {
                "schema": {"type": "object", "properties": {"data": {"type": "string"}}}
            }
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
        extra = {"requestBody": {"required": True, "content": content}}
        responses = {200: ok} | errors
        app.add_api_route(path, endpoint, methods=["POST"], responses=responses, openapi_extra=extra)
    of_get = {status: errors[status] for status in (401, 403, 404, 500) if status in errors}
    app.add_api_route("/v1/models", api.models, responses=of_get)
    app.add_api_route("/v1/models/{model:path}", api.model, responses=of_get)
    app.add_api_route("/health", api.health, responses={503: {"description": "the engine has failed"}})
    app.add_api_route("/metrics", api.show_metrics, response_class=PlainTextResponse)

    generate = app.openapi

    def openapi() -> dict:
        if not app.openapi_schema:
            paths, schemas = generate()["paths"], app.openapi_schema["components"]["schemas"]
            kinds = [(schema, "validation") for _, _, schema in posts]
            schemas |= models_json_schema(kinds, ref_template="#/components/schemas/{model}")[1]["$defs"]
            del paths["/v1/models/{model}"]["get"]["responses"]["422"]  # FastAPI's own: a string is never wrong
            del schemas["HTTPValidationError"], schemas["ValidationError"]
            if api.api_key:
                app.openapi_schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path in filter(lambda path: path.startswith("/v1"), paths):
                    for operation in paths[path].values():
                        operation["security"] = [{"key": []}]
        return app.openapi_schema

    app.openapi = openapi


# ---------------------------------------------------------------- 3. metrics


class Histogram:
    """Counts of durations up to some bounds, in seconds."""

    BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

    def __init__(self):
        self.counts, self.sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[sum(seconds > bound for bound in self.BOUNDS)] += 1
        self.sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.BOUNDS, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What /metrics shows, in Prometheus' text format."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token, self.whole = Histogram(), Histogram()
        self.tools_left_out = 0

    def observe(self, job: Job) -> None:
        """Takes the times of a job that has ended."""
        if job.first_token_at:
            self.first_token.add(job.first_token_at - job.submitted_at)
            if job.finish_reason != "cancelled":
                self.whole.add(job.finished_at - job.submitted_at)

    def text(self) -> str:
        engine, stats, lines = self.engine, self.engine.stats, []

        def add(name: str, kind: str, about: str, *values: str) -> None:
            lines.extend([f"# HELP minimind_{name} {about}", f"# TYPE minimind_{name} {kind}"])
            lines.extend(f"minimind_{name}{value}" for value in values)

        requests = sorted(self.requests.items())
        labels = [f'{{endpoint="{path}",status="{status}"}} {count}' for (path, status), count in requests]
        add("http_requests_total", "counter", "HTTP requests; 499: the client went away", *labels)
        ended = [f'{{finish_reason="{reason}"}} {count}' for reason, count in sorted(stats.requests.items())]
        add("replies_total", "counter", "Replies and embeddings that have ended", *ended)
        add("prompt_tokens_total", "counter", "Tokens of prompts", f" {stats.prompt_tokens}")
        add("cached_tokens_total", "counter", "Those of them found in the KV cache", f" {stats.cached_tokens}")
        add("completion_tokens_total", "counter", "Tokens of replies, end tokens too", f" {stats.completion_tokens}")
        add("tools_left_out_total", "counter", "Tools that did not fit into the context", f" {self.tools_left_out}")
        add("engine_steps_total", "counter", "Forward passes", f" {stats.steps}")
        add("queue_waiting", "gauge", "Replies waiting for a slot", f" {engine.num_waiting}")
        add("queue_limit", "gauge", "Replies that may wait", f" {engine.max_queue}")
        add("slots_running", "gauge", "Replies being computed", f" {engine.num_running}")
        add("slots_total", "gauge", "Replies that can be computed at once", f" {engine.max_batch}")
        for name, about, histogram in (
            ("time_to_first_token_seconds", "From being queued to the first token", self.first_token),
            ("reply_seconds", "From being queued to the end of the reply", self.whole),
        ):
            add(name, "histogram", about)
            lines.extend(histogram.lines(f"minimind_{name}"))
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
