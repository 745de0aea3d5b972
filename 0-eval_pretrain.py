"""Looks at what pretraining taught: continues texts, measures held-out text.

Reads   out/pretrain_{dim}[_moe].pth, or another with --weight; with --data_path text to measure
Writes  nothing, but the token cache beside --data_path
Run     python 0-eval_pretrain.py                             texts you type; built-in ones if input is no terminal
        python 0-eval_pretrain.py --prompt 中国的首都 人工智能    these texts
        python 0-eval_pretrain.py --data_path dataset/pretrain_val.csv    perplexity and bits a byte of this file
Next    python 3-full_sft.py teaches it to answer

检验预训练的效果：续写文本，测量留出文本。
读入    out/pretrain_{dim}[_moe].pth，或用 --weight 指定；用 --data_path 给出要测量的文本
写出    无（只在 --data_path 旁建立词元缓存）
运行    python 0-eval_pretrain.py（续写键入的文本；输入不是终端时续写内置文本）
        python 0-eval_pretrain.py --prompt 中国的首都 人工智能（续写给出的文本）
        python 0-eval_pretrain.py --data_path dataset/pretrain_val.csv（该文件的困惑度与每字节比特数）
下一步  python 3-full_sft.py 教它回答问题
"""

import argparse
import json
import math
import sys
import time

import torch
import torch.nn.functional as F

from model.checkpoint import find_adapters, find_weights, load_model
from model.cli import add_lora_flag, add_place_flags, number, positive_int, run_main
from model.dataset import IGNORE, PretrainData
from model.generate import Sampling, add_sampling_flags, fit_prompt, prepare, stream
from model.LMConfig import SIZES
from model.runtime import keep_freed_memory, pick_device, pick_dtype
from model.tokenizer import load_tokenizer

PROMPTS = [
    "中国的首都是",
    "人工智能是",
    "春天来了，",
    "从前有一个国王，",
    "话说天下大势，",
    "这部电影",
    "我喜欢吃",
    "读书的好处是",
    "月亮绕着地球转，",
    "比喻做事",
]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weight", default="pretrain", help="a stage's name in --out_dir, or a .pth (default: pretrain)")
    add("--size", choices=SIZES, default="small", help="model size, for the file's name (default: small)")
    add("--n_heads", type=positive_int, help="query heads of a .pth without .json (default: 16, as all of v1)")
    add("--prompt", nargs="+", help="texts to continue")
    add("--data_path", help="held-out text, in any format that 1-pretrain.py reads")
    add("--max_new_tokens", type=positive_int, default=128, help="tokens of a continuation at most (default: 128)")
    add("--max_seq_len", type=number(int, 8), help="tokens of text and continuation (default: what it was trained on)")
    add("--batch_size", type=positive_int, default=16, help="texts, or rows, computed together (default: 16)")
    add("--json", action="store_true", help="write JSON, an object a line")
    add_lora_flag(parser)
    add_sampling_flags(parser)
    add_place_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)

    # 1. The model
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(args.tokenizer_dir)
    path = find_weights(args.weight, args.out_dir, args.size)
    adapters = find_adapters(args.lora, args.out_dir, args.size)
    model, meta = load_model(path, tokenizer=tokenizer, n_heads=args.n_heads, adapters=adapters)
    millions = model.num_parameters() / 1e6
    files = " + ".join(map(str, [path, *adapters]))
    print(f"{files}: {millions:.1f}M parameters, {device}, {str(dtype)[6:]} ({reason})", file=sys.stderr)
    model = prepare(model, device, dtype)
    limit = args.max_seq_len or model.config.max_seq_len

    # 2. Held-out text
    if args.data_path:
        isolate = not meta.get("args", {}).get("cross_documents", False)  # measured the way it was trained
        data = PretrainData(args.data_path, tokenizer, limit, isolate=isolate)
        figures = measure(model, data, args.batch_size, device)
        if args.json:
            print(json.dumps({"data_path": args.data_path} | figures))
        else:
            print(
                f"{args.data_path}: loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}, "
                f"{figures['bits_per_byte']:.4f} bits a byte, {figures['tokens']:,} tokens"
            )

    # 3. Continuations
    if args.prompt:
        continue_texts(args, model, tokenizer, limit, sampling, args.prompt)
    elif not args.data_path and not sys.stdin.isatty():
        continue_texts(args, model, tokenizer, limit, sampling, PROMPTS)
    elif not args.data_path:
        print("type the beginning of a text; an empty line: built-in ones; Ctrl-D: leave", file=sys.stderr)
        while True:
            try:
                text = input("> ")
            except EOFError:
                break
            continue_texts(args, model, tokenizer, limit, sampling, [text] if text else PROMPTS)


@torch.inference_mode()
def measure(model, data: PretrainData, batch_size: int, device: torch.device) -> dict:
    """Loss in nats a token, its perplexity, and bits a byte, over all rows of `data`."""
    nats = 0.0
    for start in range(0, data.num_rows, batch_size):
        batch = data.rows(0, start, min(start + batch_size, data.num_rows)).to(device)
        keep = batch.labels != IGNORE
        logits, _ = model(batch.input_ids, documents=batch.documents, select=keep)
        nats += F.cross_entropy(logits.float(), batch.labels[keep], reduction="sum").item()
        if sys.stderr.isatty():
            print(f"\rrow {min(start + batch_size, data.num_rows)}/{data.num_rows} ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r" + " " * 40, end="\r", file=sys.stderr)
    loss = nats / data.num_tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": nats / math.log(2) / data.num_bytes,
        "tokens": data.num_tokens,
    }


def continue_texts(args, model, tokenizer, limit: int, sampling: Sampling, texts: list[str]) -> None:
    """Prints the continuation of every text; text i draws its random numbers from the seed + i."""
    reserve = min(args.max_new_tokens, limit // 2)
    fitted = [fit_prompt(text, tokenizer, limit, reserve) for text in texts]
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), args.batch_size):
        part = fitted[start : start + args.batch_size]
        alone = len(part) == 1 and not args.json  # then it is shown as it comes
        if alone:
            print(texts[start], end="", flush=True)
        replies = {}
        pieces = stream(
            model,
            [prompt.ids for prompt in part],
            max_new_tokens=[min(args.max_new_tokens, limit - len(prompt.ids)) for prompt in part],
            tokenizer=tokenizer,
            **(vars(sampling) | {"seed": args.seed + start}),
        )
        for piece in pieces:
            replies[piece.row] = piece.reply
            if alone:
                print(piece.text, end="", flush=True)
        for i, prompt in enumerate(part):
            reply = replies[i]
            tokens += reply.completion_tokens
            if args.json:
                record = {
                    "prompt": texts[start + i],
                    "text": reply.text,
                    "finish_reason": reply.finish_reason,
                    "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens,
                    "cut_tokens": prompt.cut_tokens,
                }
                print(json.dumps(record, ensure_ascii=False), flush=True)
            else:
                print("\n" if alone else f"{texts[start + i]}{reply.text}\n", flush=True)
            if prompt.note:
                print(f"[{prompt.note}]", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"[{tokens} tokens, {seconds:.2f} s, {tokens / seconds:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
