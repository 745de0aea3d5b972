"""Many clients at once on a server of its own, half of which hang up: answers, memory and slots are watched.

    python scripts/soak.py                                        64 clients, two minutes, out/full_sft_512.pth
    python scripts/soak.py --seconds 30 -- --size tiny            after --: flags of my_openai_api.py

First every question is asked alone. Then all clients ask at once; whoever does not hang up must get the same answer,
to the letter. Printed are the server's resident memory and what /metrics says. Linux only.

让许多客户端同时提问，其中一半中途断开：检查答案与单独提问时一致、内存不增长、结束后槽位全部空闲。
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEY = "soak"
TRIES = 300  # times 0.2 s: how long the server may take to start
GROWTH_MB = 16  # of memory, between 40 s and the end: the allocator's noise


def questions() -> list[dict]:
    """Requests of every kind, greedy and sampled, each of which has one right answer."""
    texts = ["你好", "你是谁？", "“僧多粥少”是什么意思？", "Write a long story. " * 8]
    asked = []
    for i, text in enumerate(texts):
        messages = [{"role": "user", "content": text}]
        for j, settings in enumerate(({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 7 + i})):
            body = {"messages": messages, "max_tokens": 96 - 16 * i, **settings}
            asked += [body | {"stream": True, "stream_options": {"include_usage": True}}]
            asked += [[body | {"stop": ["。"]}, body | {"n": 2}][j]]
    history = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    again = {"messages": [*history, {"role": "user", "content": "再见"}], "temperature": 0, "max_tokens": 64}
    asked += [again, again | {"logprobs": True, "top_logprobs": 2, "stream": True}]
    asked += [again | {"response_format": {"type": "json_object"}, "max_tokens": 40, "seed": 1, "temperature": 1.0}]
    return asked


class Refused(Exception):
    """The server answered, but not with 200."""


async def ask(port: int, body: dict | None, path: str = "/v1/chat/completions", leave_after: float | None = None):
    """What a question brings: the body of the answer, or a stream's events; None if the client hangs up before its end.

    leave_after: hang up after that many seconds. Raises: Refused.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        data = json.dumps(body).encode() if body else b""
        head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        try:
            raw = await asyncio.wait_for(reader.read(-1), leave_after or 300)
        except TimeoutError:
            if leave_after is None:
                raise
            return None
    finally:
        writer.transport.abort()
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise Refused(f"{head.splitlines()[0].decode() if head else 'no answer'}: {rest[:300].decode()}")
    if b"event-stream" in head:
        return [line[6:] for line in rest.splitlines() if line.startswith(b"data: ")]
    return rest


def answer(raw: bytes | list[bytes]) -> dict:
    """What must be the same each time: texts, reasons and usage, without ids, times and how the text was cut up.

    Log-probabilities go by their tokens only: a batch adds up in another order than one reply.
    """
    if isinstance(raw, bytes):
        reply = json.loads(raw)
        texts = {choice["index"]: choice["message"]["content"] for choice in reply["choices"]}
        reasons = {choice["index"]: choice["finish_reason"] for choice in reply["choices"]}
        return {"texts": texts, "reasons": reasons, "completion_tokens": reply["usage"]["completion_tokens"]}
    if raw[-1] != b"[DONE]":
        raise ValueError(f"the stream ends with {raw[-1]!r}")
    texts, reasons, tokens, usage = {}, {}, [], None
    for event in map(json.loads, raw[:-1]):
        usage = (event.get("usage") or {}).get("completion_tokens", usage)
        for choice in event["choices"]:
            i = choice["index"]
            texts[i] = texts.get(i, "") + (choice["delta"].get("content") or "")
            reasons[i] = choice["finish_reason"] or reasons.get(i)
            tokens += [token["token"] for token in (choice.get("logprobs") or {}).get("content") or ()]
    return {"texts": texts, "reasons": reasons, "completion_tokens": usage, "tokens": tokens}


def resident_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


async def metrics(port: int) -> dict[str, float]:
    """/metrics as name -> value."""
    lines = (await ask(port, None, "/metrics")).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")}


async def wait_until_up(port: int, server: subprocess.Popen) -> None:
    """Raises: ValueError if the server ends instead."""
    for _ in range(TRIES):
        if server.poll() is not None:
            raise ValueError(f"the server ended with {server.returncode} before it was up")
        try:
            await ask(port, None, "/health")
            return
        except OSError:
            await asyncio.sleep(0.2)
    raise ValueError("the server is not up after a minute")


async def soak(port: int, server: subprocess.Popen, clients: int, seconds: float, seed: int) -> dict:
    """Runs all of it. Raises: ValueError at the first answer that differs."""
    await wait_until_up(port, server)
    asked = questions()
    right = [answer(await ask(port, body)) for body in asked]
    counts = {"answers": 0, "hung up": 0, "refused": 0}
    begin = time.monotonic()

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.monotonic() - begin < seconds:
            i = rng.randrange(len(asked))
            leave_after = rng.choice((0.0, 0.05, 0.5, 2.0)) * rng.random() + 1e-3 if number % 2 else None
            try:
                raw = await ask(port, asked[i], leave_after=leave_after)
            except Refused as error:
                if " 503 " not in str(error):
                    raise ValueError(f"{json.dumps(asked[i], ensure_ascii=False)}: {error}") from None
                counts["refused"] += 1
                await asyncio.sleep(1)
                continue
            counts["hung up" if raw is None else "answers"] += 1
            if raw is not None and (got := answer(raw)) != right[i]:
                raise ValueError(f"{json.dumps(asked[i], ensure_ascii=False)}: {got} instead of {right[i]}")

    memory = [round(resident_mb(server.pid))]

    async def watch() -> None:
        while time.monotonic() - begin < seconds:
            await asyncio.sleep(min(20.0, seconds / 6))
            memory.append(round(resident_mb(server.pid)))
            print(f"{time.monotonic() - begin:5.0f} s  {memory[-1]} MB  {counts}", flush=True)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        for number in range(clients):
            group.create_task(client(number))
    for _ in range(50):  # the engine learns of the last who hung up at its next step
        state = await metrics(port)
        if not any(value for name, value in state.items() if re.search("running|waiting", name)):
            break
        await asyncio.sleep(0.1)
    after = [answer(await ask(port, body)) for body in asked]
    return {"memory_mb": memory, **counts, "same_after": after == right, "metrics": state}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, help="at once; every second one hangs up at random moments")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("server_flags", nargs="*", help="after --: flags of my_openai_api.py")
    args = parser.parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "my_openai_api.py"), "--port", str(port), "--api_key", KEY]
    server = subprocess.Popen(
        [*command, "--log_level", "warning", *args.server_flags], env=os.environ | {"PYTHONUTF8": "1"}
    )
    try:
        report = asyncio.run(soak(port, server, args.clients, args.seconds, args.seed))
    except (ValueError, OSError, ExceptionGroup) as error:
        first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        print(f"error: {first!r}", file=sys.stderr)
        return 1
    finally:
        server.terminate()
        code = server.wait(60)
    print(json.dumps(report, ensure_ascii=False, indent=1))
    memory = report["memory_mb"][2:]
    flat = max(memory) - memory[0] <= GROWTH_MB
    idle = not any(value for name, value in report["metrics"].items() if re.search("running|waiting", name))
    print(
        f"answers all the same: {report['same_after']}; memory flat: {flat}; slots all free: {idle}; exit code {code}"
    )
    return 0 if report["same_after"] and flat and idle and report["answers"] else 1


if __name__ == "__main__":
    sys.exit(main())
