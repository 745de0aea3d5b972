"""Measures speed and memory, side by side with others in one run, so that a busy or slow machine is fair to all.

    python scripts/benchmark.py train                      our training step and that of transformers' Llama
    python scripts/benchmark.py train --v1 ../minimind     and MiniMind v1's, from a checkout of its repository
    python scripts/benchmark.py decode                     generation of one stream and of a batch
    python scripts/benchmark.py serve                      many streams: the engine, the server, and others
    python scripts/benchmark.py memory                     memory of 1-pretrain.py with a small and a large file

Everyone computes in a process of its own; they take turns, a round each. Printed are medians over the rounds, with
the smallest and the largest. --json writes everything.

测量训练、生成的速度与内存占用。各方在各自的进程中轮流运行，取各轮的中位数，因此机器的快慢与负载对各方相同。
"""

import argparse
import asyncio
import atexit
import contextlib
import csv
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from model.checkpoint import atomic_write, save_weights  # noqa: E402
from model.cli import ROOT, number, positive_int, run_main  # noqa: E402
from model.dataset import IGNORE, PretrainData, read_records, to_text  # noqa: E402
from model.engine import Engine, Request  # noqa: E402
from model.generate import Sampling, generate, prepare, stream  # noqa: E402
from model.LMConfig import SIZES, LMConfig  # noqa: E402
from model.log import training_flops_per_token  # noqa: E402
from model.model import Transformer  # noqa: E402
from model.optim import make_optimizer  # noqa: E402
from model.runtime import (  # noqa: E402
    DTYPES,
    Run,
    measure_peak_flops,
    peak_memory_bytes,
    pick_device,
    pick_dtype,
    synchronize,
)
from model.tokenizer import load_tokenizer  # noqa: E402

WARM_UP_STEPS = 2
DOCUMENT_TOKENS = 64  # about the mean of the demo corpus; for --isolate_documents

# ---------------------------------------------------------------- 1. processes that take turns


class Contestant:
    """A process that measures one round whenever it is asked to."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name = name
        spec = json.dumps({**vars(args), "contestant": name}, default=str)
        command = [sys.executable, __file__, "contestant", spec]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, **request) -> dict:
        """The figures of one round."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Lets the process clean up; kills it if it will not end."""
        self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def answer(self) -> dict:
        """What the process says next. Raises: ValueError when it has failed; it has said why on stderr."""
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"{self.name} ended with exit code {self.process.wait()}; why is above")
        return json.loads(answer)


def take_turns(names: list[str], args: argparse.Namespace, requests: list[dict]) -> list[dict[str, list[dict]]]:
    """For every request the answers of every contestant, a list of `args.rounds` each."""
    contestants = [Contestant(name, args) for name in names]
    results = [{name: [] for name in names} for _ in requests]
    total = len(requests) * args.rounds * len(names)
    try:
        for contestant in contestants:
            contestant.answer()  # it is ready: nobody is measured while another starts
        with tqdm(total=total, unit="round", disable=not sys.stderr.isatty()) as bar:
            for (request, result), _ in itertools.product(zip(requests, results, strict=True), range(args.rounds)):
                for contestant in contestants:
                    bar.set_description(contestant.name)
                    result[contestant.name].append(contestant.round(**request))
                    bar.update()
    finally:
        for contestant in contestants:
            contestant.end()
    return results


def contest(spec: str) -> None:
    """The life of a contestant's process: a line when it is ready, then one for every request line."""
    args = argparse.Namespace(**json.loads(spec))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print goes to stderr
    measure = CONTESTANTS[args.command, args.contestant](args)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("{}", file=answers, flush=True)
    for request in sys.stdin:
        print(json.dumps(measure(**json.loads(request))), file=answers, flush=True)


# ---------------------------------------------------------------- 2. a training step


def train_rounds(args, device: torch.device, dtype: torch.dtype, step: Callable, seq_len: int) -> Callable[[], dict]:
    """A function that measures `args.steps` steps on random tokens; `step` takes input ids, labels, documents."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, seq_len)
    input_ids = torch.randint(3, 6400, shape, generator=generator)
    labels = input_ids.roll(-1, 1)
    documents = None
    if args.isolate_documents:
        documents = (torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS).cumsum(1).int() + 1
    batch = [None if x is None else x.to(device) for x in (input_ids, labels, documents)]
    for _ in range(WARM_UP_STEPS):
        step(*batch)

    def measure() -> dict:
        peak_flops = measure_peak_flops(device, dtype)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(args.steps):
            step(*batch)
        synchronize(device)
        seconds = time.perf_counter() - start
        return {
            "tokens_per_second": args.steps * input_ids.numel() / seconds,
            "peak_flops": peak_flops,
            "memory_bytes": peak_memory_bytes(device),
            "dtype": str(dtype).removeprefix("torch."),
        }

    return measure


def train_ours(args) -> Callable[[], dict]:
    """The loop body of 1-pretrain.py."""
    run = Run(args)
    model = Transformer(LMConfig.from_size(args.size, max_seq_len=args.max_seq_len))
    run.place(model, args)
    model, optimizer = run.parallel.wrap(model, make_optimizer(model, "adamw", 5e-4, 0.1))

    def step(input_ids, labels, documents) -> None:
        with run.autocast():
            logits, aux = model(input_ids, documents=documents)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        run.backward(loss + aux)
        run.step(model, optimizer, 1.0)

    return train_rounds(args, run.device, run.dtype, step, args.max_seq_len)


def llama_config(config: LMConfig):
    """The same shape in the terms of transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )


def train_transformers(args) -> Callable[[], dict]:
    """LlamaForCausalLM with autocast and fused AdamW, as its users would write the step."""
    from transformers import LlamaForCausalLM

    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(llama_config(LMConfig.from_size(args.size))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(input_ids, labels, documents) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train_rounds(args, device, dtype, step, args.max_seq_len)


def train_v1(args) -> Callable[[], dict]:
    """MiniMind v1's step: rows one token short, float32 on a CPU, float16 autocast with a scaler on CUDA."""
    ours = [name for name in sys.modules if name.partition(".")[0] == "model"]
    for name in ours:  # v1's package has the same name
        del sys.modules[name]
    sys.path[:] = [args.v1] + [path for path in sys.path if Path(path).resolve() != ROOT]
    from model.LMConfig import LMConfig as V1Config
    from model.model import Transformer as V1Transformer

    device = pick_device(args.device)
    cuda = device.type == "cuda"
    torch.manual_seed(args.seed)
    model = V1Transformer(V1Config(**SIZES[args.size], max_seq_len=args.max_seq_len)).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    scaler = torch.amp.GradScaler(enabled=cuda)

    def step(input_ids, labels, documents) -> None:
        with torch.autocast("cuda", torch.float16, enabled=cuda):
            losses = model(input_ids, labels).last_loss
            mask = torch.ones_like(losses)
            loss = torch.sum(losses * mask) / mask.sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    dtype = torch.float16 if cuda else torch.float32
    return train_rounds(args, device, dtype, step, args.max_seq_len - 1)


def real_shares(args, tokenizer) -> dict[str, float]:
    """The share of trained positions that are real tokens, packed as we do it and padded as v1 does it.

    v1 cuts every <s>text</s> to max_seq_len tokens, pads it to that length, and trains it shifted by one.
    """
    data = PretrainData(args.data_path, tokenizer, args.max_seq_len)
    packed = data.num_tokens / (data.num_rows * data.max_seq_len)
    shares = {"ours": packed, "transformers": packed}
    if args.v1:
        real = num_rows = 0
        texts = (to_text(record) for _, record in read_records(args.data_path, lambda *fault: None))
        while batch := list(itertools.islice(texts, 4096)):
            real += sum(min(len(ids) + 2, args.max_seq_len) - 1 for ids in tokenizer.encode_batch(batch))
            num_rows += len(batch)
        shares["v1"] = real / (num_rows * (args.max_seq_len - 1))
    return shares


def train(args: argparse.Namespace) -> dict:
    names = ["ours", "transformers"] + ["v1"] * bool(args.v1)
    if args.v1 and not (Path(args.v1) / "model/model.py").is_file():
        raise ValueError(f"--v1 {args.v1}: no checkout of MiniMind v1, model/model.py is missing")
    if SIZES[args.size].get("use_moe"):
        names.remove("transformers")  # it has no model of this shape
    shares = real_shares(args, load_tokenizer(args.tokenizer_dir)) if os.path.exists(args.data_path) else {}
    with torch.device("meta"):
        flops_per_token = training_flops_per_token(Transformer(LMConfig.from_size(args.size)), args.max_seq_len)
    rounds = take_turns(names, args, [{}])[0]

    results = {}
    for name in names:
        peak = max(r["peak_flops"] for r in rounds[name])
        results[name] = r = summary([r["tokens_per_second"] for r in rounds[name]])
        r["dtype"] = rounds[name][0]["dtype"]
        r["peak_tflops"] = peak / 1e12
        r["mfu"] = r["median"] * flops_per_token / peak
        r["memory_gib"] = rounds[name][-1]["memory_bytes"] / 2**30
        if name in shares:
            r["real_share"] = shares[name]
            r["real_tokens_per_second"] = r["median"] * shares[name]

    print(f"\nTraining, size {args.size}, {args.batch_size} rows of {args.max_seq_len}, rounds of {args.steps} steps")
    columns = {  # title: key and format
        "peak TFLOP/s": ("peak_tflops", ".2f"),
        "MFU": ("mfu", ".0%"),
        "real tokens": ("real_share", ".1%"),
        "real tokens/s": ("real_tokens_per_second", ",.0f"),
        "memory GiB": ("memory_gib", ".2f"),
    }
    rows = [["", "tokens/s", "from - to", "dtype", *columns]]
    for name, r in results.items():
        cells = [format(r[key], spec) if key in r else "-" for key, spec in columns.values()]
        rows.append([name, *spread(r), r["dtype"], *cells])
    print_table(rows)
    ratios = compare(results)
    if args.v1 and shares:
        ratios["v1, real tokens"] = ratios["v1"] * shares["ours"] / shares["v1"]
        print(f"ours / v1 in real tokens: {ratios['v1, real tokens']:.2f}")
    return {"results": results, "ratios": ratios}


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def spread(r: dict) -> tuple[str, str]:
    return f"{r['median']:,.0f}", f"{r['min']:,.0f} - {r['max']:,.0f}"


def print_table(rows: list[list[str]]) -> None:
    """Prints columns as wide as their longest cell, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def compare(results: dict[str, dict]) -> dict[str, float]:
    """Ours against each other one: the median of the ratios of rounds that followed each other."""
    ratios = {}
    for name in results:
        if name != "ours":
            pairs = [a / b for a, b in zip(results["ours"]["rounds"], results[name]["rounds"], strict=True)]
            ratios[name] = statistics.median(pairs)
            print(f"ours / {name}: {ratios[name]:.2f} ({min(pairs):.2f} - {max(pairs):.2f})")
    return ratios


# ---------------------------------------------------------------- 3. generation


def decode_rounds(args, load: Callable, reply: Callable) -> Callable[..., dict]:
    """A function that measures one generation; `load(dtype)` is the model, `reply(model, prompts)` the new ids."""
    generator = torch.Generator().manual_seed(args.seed)
    models = {name: load(DTYPES[name]) for name in args.dtypes}

    def measure(dtype: str, batch_size: int) -> dict:
        prompts = torch.randint(3, 6400, (batch_size, args.prompt_tokens), generator=generator)
        start = time.perf_counter()
        ids = reply(models[dtype], prompts)
        seconds = time.perf_counter() - start
        if any(len(row) != args.new_tokens for row in ids):
            raise ValueError(f"a reply does not have {args.new_tokens} tokens")
        return {"tokens_per_second": batch_size * args.new_tokens / seconds, "ids": ids}

    for dtype, batch_size in itertools.product(args.dtypes, args.batch_sizes):
        measure(dtype, batch_size)  # to warm up
    return measure


def random_model(args) -> Transformer:
    """A model with weights that are the same for every contestant."""
    torch.manual_seed(args.seed)
    return Transformer(LMConfig.from_size(args.size)).eval()


def decode_ours(args) -> Callable[..., dict]:
    """model/generate.py, as 2-eval.py uses it."""
    device = pick_device(args.device)

    def reply(model, prompts) -> list[list[int]]:
        replies = generate(model, prompts.tolist(), max_new_tokens=args.new_tokens, temperature=0, eos_id=None)
        return [reply.ids for reply in replies]

    return decode_rounds(args, lambda dtype: prepare(random_model(args), device, dtype), reply)


def decode_transformers(args) -> Callable[..., dict]:
    """LlamaForCausalLM.generate with its own cache, on the same weights."""
    device = pick_device(args.device)

    def reply(model, prompts) -> list[list[int]]:
        return transformers_reply(model, prompts.to(device), args.new_tokens)

    return decode_rounds(args, lambda dtype: as_llama(random_model(args)).to(device, dtype), reply)


@torch.inference_mode()
def transformers_reply(model, prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=True)
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    return ids[:, prompts.shape[1] :].tolist()


def as_llama(model: Transformer):
    """The same function of the same weights in transformers, whose rotary pairs are channels i and i + C / 2."""
    from transformers import LlamaForCausalLM

    config = model.config
    names = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    names |= {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    names |= {"attention": "self_attn", "feed_forward": "mlp"}
    names |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {"tok_embeddings": "model.embed_tokens", "layers": "model.layers", "output": "lm_head"}
    state = {}
    for key, weight in model.state_dict().items():
        if ".wq." in key or ".wk." in key:  # per head, even channels first
            weight = weight.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(weight.shape)
        key = "model." + key if key == "norm.weight" else key
        state[".".join(names.get(part, part) for part in key.split("."))] = weight
    llama = LlamaForCausalLM(llama_config(config)).eval()
    llama.load_state_dict(state)
    return llama


def decode(args: argparse.Namespace) -> dict:
    if SIZES[args.size].get("use_moe"):
        raise ValueError(f"--size {args.size}: transformers has no model of this shape to compare with")
    requests = [{"dtype": d, "batch_size": b} for d, b in itertools.product(args.dtypes, args.batch_sizes)]
    rounds = take_turns(["ours", "transformers"], args, requests)
    print(f"\nGeneration, size {args.size}, {args.prompt_tokens} tokens of prompt, {args.new_tokens} new ones, greedy")
    rows = [["", "dtype", "streams", "tokens/s", "from - to"]]
    cases = []
    for request, answers in zip(requests, rounds, strict=True):
        results = {name: summary([r["tokens_per_second"] for r in answers[name]]) for name in answers}
        rows += [[name, request["dtype"], str(request["batch_size"]), *spread(r)] for name, r in results.items()]
        pairs = zip(*([row for r in answers[name] for row in r["ids"]] for name in answers), strict=True)
        same = [a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
        cases.append(request | {"results": results, "same_tokens": sum(same) / len(same)})
    print_table(rows)
    for case in cases:
        print(f"{case['dtype']}, {case['batch_size']} streams, {case['same_tokens']:.0%} of tokens equal: ", end="")
        case["ratios"] = compare(case["results"])
    return {"cases": cases}


# ---------------------------------------------------------------- 4. serving


def serve_rounds(args, run: Callable[[list[list[int]], int], tuple[list[float], list[int]]]) -> Callable[..., dict]:
    """A function that measures streams that start together.

    `run(prompts, new_tokens)` returns seconds to the first token, and the number of new tokens, of every stream.
    """
    generator = torch.Generator().manual_seed(args.seed)

    def measure(streams: int, prompt_tokens: int, new_tokens: int) -> dict:
        prompts = torch.randint(3, 6400, (streams, prompt_tokens), generator=generator).tolist()
        start = time.perf_counter()
        first_seconds, counts = run(prompts, new_tokens)
        seconds = time.perf_counter() - start
        if counts != [new_tokens] * streams:
            raise ValueError(f"the replies have {counts} tokens, not {new_tokens} each")
        return {"tokens_per_second": streams * new_tokens / seconds, "first_seconds": first_seconds}

    measure(16, 32, 16)  # to warm up
    return measure


def serve_engine(args) -> Callable[..., dict]:
    """model/engine.py, in the process itself."""
    device = pick_device(args.device)
    model = prepare(random_model(args), device, DTYPES[args.dtype])
    engine = Engine(model, load_tokenizer(), max_batch=max(args.streams))

    def run(prompts, new_tokens):
        jobs = engine.run([Request(prompt, new_tokens, Sampling(temperature=0), eos_id=None) for prompt in prompts])
        return [job.first_token_at - job.submitted_at for job in jobs], [len(job.ids) for job in jobs]

    return serve_rounds(args, run)


def serve_http(args) -> Callable[..., dict]:
    """my_openai_api.py, asked over as many connections as there are streams, by a client in this process."""
    folder = Path(tempfile.mkdtemp())
    model = random_model(args)
    about = {"config": model.config.to_dict(), "tokenizer": load_tokenizer().fingerprint}
    save_weights(folder / "random.pth", model.state_dict(), about)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "my_openai_api.py"), "--weight", str(folder / "random.pth")]
    command += ["--port", str(port), "--device", args.device, "--dtype", args.dtype, "--log_level", "warning"]
    server = subprocess.Popen([*command, "--max_batch", str(max(args.streams))])
    atexit.register(server.terminate)
    atexit.register(shutil.rmtree, folder)

    async def one(prompt: list[int], new_tokens: int) -> tuple[float, int]:
        """A streamed completion with the least work on this side: it shares the processor with the server."""
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        first, tail = 0.0, b""
        while part := await reader.read(1 << 16):
            if not first and b"data: " in part:
                first = time.perf_counter() - start
            tail = (tail + part)[-2000:]
        writer.close()
        count = re.findall(rb'"completion_tokens": ?(\d+)', tail)
        if not count or b"[DONE]" not in tail:
            raise ValueError(f"the server answered {tail[:300]!r}")
        return first, int(count[-1])

    async def all_together(prompts, new_tokens):
        return await asyncio.gather(*(one(prompt, new_tokens) for prompt in prompts))

    def run(prompts, new_tokens):
        return tuple(map(list, zip(*asyncio.run(all_together(prompts, new_tokens)), strict=True)))

    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return serve_rounds(args, run)
        if server.poll() is not None:
            raise ValueError("the server has ended; why is above")
        time.sleep(0.1)
    raise ValueError("the server has not come up in 60 seconds")


def serve_generate(args) -> Callable[..., dict]:
    """generate of model/generate.py: a batch from beginning to end."""
    model = prepare(random_model(args), pick_device(args.device), DTYPES[args.dtype])

    def run(prompts, new_tokens):
        start, firsts, counts = time.perf_counter(), {}, {}
        for piece in stream(model, prompts, max_new_tokens=new_tokens, temperature=0, eos_id=None):
            firsts.setdefault(piece.row, time.perf_counter() - start)
            counts[piece.row] = len(piece.reply.ids)
        return list(firsts.values()), [counts[row] for row in range(len(prompts))]

    return serve_rounds(args, run)


def serve_transformers(args) -> Callable[..., dict]:
    """LlamaForCausalLM.generate: a batch from beginning to end."""
    device = pick_device(args.device)
    model = as_llama(random_model(args)).to(device, DTYPES[args.dtype])

    def run(prompts, new_tokens):
        return [], [len(ids) for ids in transformers_reply(model, torch.tensor(prompts, device=device), new_tokens)]

    return serve_rounds(args, run)


def serve_llama_cpp(args) -> Callable[..., dict]:
    """llama.cpp as the package xllamacpp, with the file of --gguf, on as many threads as torch has."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = args.gguf
    params.n_parallel = max(args.streams)
    params.n_ctx = params.n_parallel * 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def one(prompt, new_tokens):
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return server.handle_completions(body)["usage"]["completion_tokens"]

    def run(prompts, new_tokens):
        with ThreadPoolExecutor(len(prompts)) as pool:
            return [], list(pool.map(one, prompts, [new_tokens] * len(prompts)))

    return serve_rounds(args, run)


def serve(args: argparse.Namespace) -> dict:
    """Throughput with short prompts, and the time to the first token of longer ones, of streams that start together."""
    if SIZES[args.size].get("use_moe"):
        raise ValueError(f"--size {args.size}: transformers has no model of this shape to compare with")
    busy = [{"streams": n, "prompt_tokens": 32, "new_tokens": args.new_tokens} for n in args.streams]
    waits = [{"streams": n, "prompt_tokens": 200, "new_tokens": 16} for n in args.streams]
    report = []
    for dtype in args.dtypes:
        args.dtype = dtype
        ours = ["engine", "http", "generate"]
        names = ours + ["transformers"] * (dtype != "float16") + ["llama.cpp"] * bool(args.gguf)
        answers = take_turns(names, args, busy)
        print(f"\n{args.size}, {dtype}: prompts of 32 tokens, {args.new_tokens} new ones, greedy")
        rows = [["", "streams", "tokens/s", "from - to", "engine / this"]]
        for request, answer in zip(busy, answers, strict=True):
            speeds = {name: [r["tokens_per_second"] for r in answer[name]] for name in names}
            for name in names:
                ratio = statistics.median(a / b for a, b in zip(speeds["engine"], speeds[name], strict=True))
                rows.append([name, str(request["streams"]), *spread(summary(speeds[name])), f"{ratio:.2f}"])
                report.append(request | {"dtype": dtype, "name": name} | summary(speeds[name]))
        print_table(rows)
        answers = take_turns(ours[:2], args, waits)
        rows = [["to the first token of a prompt of 200", "streams", "median ms", "95th percentile"]]
        for request, answer in zip(waits, answers, strict=True):
            for name in ours[:2]:
                seconds = sorted(second for r in answer[name] for second in r["first_seconds"])
                median, late = statistics.median(seconds), seconds[int(0.95 * (len(seconds) - 1) + 0.5)]
                rows.append([name, str(request["streams"]), f"{median * 1e3:.0f}", f"{late * 1e3:.0f}"])
                report.append(request | {"dtype": dtype, "name": name, "first_median": median, "first_p95": late})
        print_table(rows)
    return {"cases": report}


# ---------------------------------------------------------------- 5. memory of pretraining


def write_corpus(path: Path, source: Path, num_bytes: int) -> None:
    """Writes a CSV of about that size: the texts of `source` over and over, each time with another first character."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        for turn in itertools.count():
            for _, record in read_records(source, lambda *fault: None):
                writer.writerow([chr(0x4E00 + turn % 20000) + to_text(record)])
                if file.tell() >= num_bytes:
                    return


def memory(args: argparse.Namespace) -> dict:
    """Peak resident memory of 1-pretrain.py: at the first run on a file, which tokenizes it, and at the second."""
    results = {}
    print(f"1-pretrain.py, size {args.size}, {args.batch_size} rows of {args.max_seq_len}, {args.steps} steps")
    for megabytes in args.mb:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.csv"
            write_corpus(data, Path(args.data_path), int(megabytes * 1e6))
            command = [sys.executable, str(ROOT / "1-pretrain.py"), "--data_path", str(data), "--val_path", ""]
            command += ["--out_dir", folder, "--max_steps", str(args.steps), "--batch_size", str(args.batch_size)]
            command += ["--size", args.size, "--max_seq_len", str(args.max_seq_len), "--device", args.device]
            command += ["--dtype", args.dtype, "--tokenizer_dir", args.tokenizer_dir]
            for run in ("first", "second"):
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                start = time.perf_counter()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    raise ValueError(f"{' '.join(command)} ended with exit code {process.returncode}; why is above")
                mebibytes = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
                seconds = time.perf_counter() - start
                results[f"{megabytes:g} MB, {run} run"] = {"peak_mib": mebibytes, "seconds": seconds}
                print(f"{megabytes:8,g} MB, {run:6} run: {mebibytes:8,.0f} MiB at most, {seconds:6.0f} s", flush=True)
    return {"results": results}


# ---------------------------------------------------------------- 6. the command line

CONTESTANTS = {
    ("train", "ours"): train_ours,
    ("train", "transformers"): train_transformers,
    ("train", "v1"): train_v1,
    ("decode", "ours"): decode_ours,
    ("decode", "transformers"): decode_transformers,
    ("serve", "engine"): serve_engine,
    ("serve", "http"): serve_http,
    ("serve", "generate"): serve_generate,
    ("serve", "transformers"): serve_transformers,
    ("serve", "llama.cpp"): serve_llama_cpp,
}


def machine(args: argparse.Namespace) -> dict:
    """What the figures depend on."""
    from importlib.metadata import version

    device = pick_device(args.device)
    names = ("torch", "transformers")
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "device": str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    } | {name: version(name) for name in names}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--size", choices=SIZES, default="small", help="model size (default: small)")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
        sub.add_argument("--json", metavar="FILE", help="write the figures to this file")
        sub.set_defaults(run=run, seed=1337)
        return sub

    def add_training(sub: argparse.ArgumentParser, steps: int) -> None:
        add = sub.add_argument
        add("--dtype", choices=["auto", *DTYPES], default="auto", help="as in 1-pretrain.py (default: auto)")
        add("--batch_size", type=positive_int, default=8, help="rows of a step (default: 8)")
        add("--max_seq_len", type=number(int, 8), default=512, help="tokens of a row (default: 512)")
        add("--steps", type=positive_int, default=steps, help=f"steps of a round (default: {steps})")
        add("--data_path", default=str(ROOT / "dataset/pretrain_data.csv"),
            help="text, to count real tokens or to fill files with (default: dataset/pretrain_data.csv)")
        add("--tokenizer_dir", default=str(ROOT / "model/minimind_tokenizer"),
            help="folder with tokenizer.json (default: model/minimind_tokenizer)")

    sub = add_command("train", train, "tokens per second of a training step")
    add_training(sub, steps=3)
    sub.add_argument("--rounds", type=positive_int, default=5, help="rounds each (default: 5)")
    sub.add_argument("--v1", metavar="DIR", help="also measure MiniMind v1, from this checkout of its repository")
    sub.add_argument("--isolate_documents", action="store_true", help="ours keeps attention inside documents")
    sub.add_argument("--compile", action="store_true", help="ours is compiled")
    sub.set_defaults(grad_checkpoint=False, fsdp=False, cpu_offload=False, deepspeed=None, local_rank=None)

    sub = add_command("decode", decode, "tokens per second of generation")
    add = sub.add_argument
    add("--rounds", type=positive_int, default=5, help="rounds each (default: 5)")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    add("--batch_sizes", nargs="+", type=positive_int, default=[1, 16], help="streams at a time (default: 1 16)")
    add("--prompt_tokens", type=positive_int, default=16, help="length of the prompts (default: 16)")
    add("--new_tokens", type=positive_int, default=128, help="length of the replies (default: 128)")

    sub = add_command("serve", serve, "tokens per second and time to the first token of many streams at once")
    add = sub.add_argument
    add("--rounds", type=positive_int, default=5, help="rounds each (default: 5)")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="(default: float32)")
    add("--streams", nargs="+", type=positive_int, default=[1, 4, 16], help="streams at a time (default: 1 4 16)")
    add("--new_tokens", type=positive_int, default=128, help="length of the replies (default: 128)")
    add("--gguf", metavar="FILE", help="also measure llama.cpp with this file (needs the package xllamacpp)")

    sub = add_command("memory", memory, "peak memory of 1-pretrain.py with files of different sizes")
    add_training(sub, steps=5)
    sub.add_argument("--mb", type=number(float, 0, above=True), nargs="+", default=[10, 1000],
                     help="sizes of the files in megabytes (default: 10 1000)")

    args = parser.parse_args(argv)
    run = args.run
    del args.run
    report = {"command": args.command, "args": vars(args).copy(), "machine": machine(args)}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    report |= run(args)
    if args.json:
        with atomic_write(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["contestant"]:
        contest(sys.argv[2])
    else:
        run_main(main)
