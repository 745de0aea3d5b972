"""Chats with a model, or answers a list of questions.

Reads   out/full_sft_{dim}[_moe].pth, or another with --weight
Writes  nothing, but what /save in a chat is told to
Run     python 2-eval.py                                      a chat; /help lists its commands
        python 2-eval.py --prompt 你是谁？ 画蛇添足是什么意思？    answers, each to a question of its own
        python 2-eval.py --prompts_file questions.txt --json  answers as JSON, an object a line
        python 2-eval.py --weight pretrain --size tiny        another stage, another size
        python 2-eval.py --lora identity                      with an adapter of 4-lora_sft.py

与模型对话，或回答一组问题。
读入    out/full_sft_{dim}[_moe].pth，或用 --weight 指定
写出    无（对话中 /save 指定的文件除外）
运行    python 2-eval.py（对话；/help 列出命令）
        python 2-eval.py --prompt 你是谁？ 画蛇添足是什么意思？（逐个回答，互不相干）
        python 2-eval.py --prompts_file questions.txt --json（以 JSON 逐行输出回答）
        python 2-eval.py --weight pretrain --size tiny（其他阶段、其他大小的模型）
        python 2-eval.py --lora identity（加上 4-lora_sft.py 训练的适配器）
"""

import argparse
import ast
import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from model.chat import ChatModel, conversation, with_seed
from model.checkpoint import atomic_write, find_adapters, find_weights
from model.cli import add_lora_flag, add_place_flags, non_negative_int, number, one_line, positive_int, run_main
from model.dataset import read_records
from model.generate import Sampling, add_sampling_flags
from model.LMConfig import SIZES

HELP = """\
/set               the settings      /set temperature=0.5   change one
/seed N            start the random numbers anew: the same questions get the same replies
/clear             forget the conversation
/save FILE         write the conversation as a line of JSON, a format that 3-full_sft.py reads
/help              this list
/exit or Ctrl-D    leave             Ctrl-C                 stop a reply"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--weight",
        default="full_sft",
        help="pretrain, full_sft or rl in --out_dir, or a .pth (default: full_sft)",
    )
    add("--size", choices=SIZES, default="small", help="model size, for the file's name (default: small)")
    add("--n_heads", type=positive_int, help="query heads of a .pth without .json (default: 16, as all of v1)")
    add("--prompt", nargs="+", help="questions to answer, instead of a chat")
    add("--prompts_file", help="a question a line (.txt); or .jsonl: {'prompt': text} or {'messages': [...]}")
    add("--system", help="system message")
    add("--history", type=non_negative_int, default=2, help="earlier turns a chat sends along (default: 2)")
    add("--max_new_tokens", type=positive_int, default=256, help="tokens of a reply at most (default: 256)")
    add("--max_seq_len", type=number(int, 16), help="tokens of prompt and reply (default: what it was trained on)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end a reply before any of these")
    add("--batch_size", type=positive_int, default=16, help="questions answered together (default: 16)")
    add("--json", action="store_true", help="with questions: write JSON, an object a line")
    add_lora_flag(parser)
    add_sampling_flags(parser)
    add_place_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    questions = read_questions(args)

    model = ChatModel.from_pretrained(
        find_weights(args.weight, args.out_dir, args.size),
        lora=find_adapters(args.lora, args.out_dir, args.size),
        tokenizer_dir=args.tokenizer_dir,
        n_heads=args.n_heads,
        device=args.device,
        dtype=args.dtype,
        max_batch=min(args.batch_size, len(questions)) or 1,
        max_queue=len(questions),
        max_seq_len=args.max_seq_len,
    )
    print(model.summary, file=sys.stderr)
    if questions:
        answer(model, questions, sampling, args)
    else:
        Chat(model, sampling, args).run()


# ---------------------------------------------------------------- questions from the command line or a file


def read_questions(args: argparse.Namespace) -> list[list[dict]]:
    """Every --prompt and every record of --prompts_file as a conversation that ends with a question."""
    first = [{"role": "system", "content": args.system}] if args.system else []
    questions = [first + [{"role": "user", "content": text}] for text in args.prompt or []]
    if not args.prompts_file:
        return questions

    def on_bad(path, line_number, reason):
        raise ValueError(f"{path}, line {line_number}: {reason}")

    for line_number, record in read_records(args.prompts_file, on_bad):
        content = record.get("prompt", record.get("text"))
        if isinstance(record.get("messages"), list):
            questions.append(record["messages"])
            if [m.get("role") for m in record["messages"] if isinstance(m, dict)][-1:] == ["assistant"]:
                on_bad(args.prompts_file, line_number, "the last message must be the user's, for the model to answer")
        elif isinstance(content, str):
            questions.append(first + [{"role": "user", "content": content}])
        else:
            on_bad(args.prompts_file, line_number, "it has neither prompt nor messages")
    if not questions:
        raise ValueError(f"{args.prompts_file} holds no questions")
    return questions


def answer(model: ChatModel, questions: list[list[dict]], sampling: Sampling, args: argparse.Namespace) -> None:
    """Prints the answers in order; question i draws its random numbers from the seed + i, whatever the batch."""
    started, tokens, jobs = time.perf_counter(), 0, []
    for i, messages in enumerate(questions):
        settings = vars(with_seed(sampling, i)) | {"max_new_tokens": args.max_new_tokens, "stop": args.stop}
        prompt, request = model.request(messages, **settings)
        jobs.append((messages[-1]["content"], prompt, model.engine.submit(request)))
    for question, prompt, job in jobs:
        while job.finish_reason is None:
            model.engine.step()
        tokens += job.completion_tokens
        record = {
            "prompt": question,
            "reply": job.text,
            "finish_reason": job.finish_reason,
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": job.completion_tokens,
            "dropped_turns": prompt.dropped_turns,
            "cut_tokens": prompt.cut_tokens,
        }
        if args.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(f"Q: {question}\nA: {job.text}\n", flush=True)
        if prompt.note:
            print(f"[{prompt.note}]", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"[{tokens} tokens, {seconds:.2f} s, {tokens / seconds:.0f} tokens/s]", file=sys.stderr)


# ---------------------------------------------------------------- a chat


class Chat:
    """A conversation in the terminal, its settings and its history."""

    def __init__(self, model: ChatModel, sampling: Sampling, args: argparse.Namespace):
        self.model, self.sampling, self.system, self.stop = model, sampling, args.system, args.stop
        self.max_new_tokens, self.history = args.max_new_tokens, args.history
        self.turns: list[tuple[str, str]] = []  # question, answer
        self.turns_since_seed = 0

    def run(self) -> None:
        """Reads lines until Ctrl-D or /exit: a command begins with /, all else is sent exactly as typed."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lets input() edit a line)
        sys.stdin.reconfigure(errors="replace")
        terminal = sys.stdin.isatty()
        if terminal:
            print("type a question; /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = input("\n> " if terminal else "")
                if line == "/exit":
                    break
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.reply(line)
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n[Ctrl-D or /exit leaves]")
            except (ValueError, OSError) as error:  # of this line only: the chat goes on
                print(f"error: {one_line(error)}")

    def reply(self, question: str) -> None:
        """Streams the reply to a question; Ctrl-C ends it, and what was said until then is kept."""
        recent = self.turns[-self.history :] if self.history else []
        settings = vars(with_seed(self.sampling, self.turns_since_seed))
        settings |= {"max_new_tokens": self.max_new_tokens, "stop": self.stop}
        prompt, request = self.model.request(conversation(question, recent, self.system), **settings)
        if prompt.note:
            print(f"[{prompt.note}]")
        text, tokens, why, started = "", 0, "interrupted", time.perf_counter()
        try:
            with contextlib.closing(self.model.follow(request)) as progress:
                for reply in progress:
                    print(reply.text[len(text) :], end="", flush=True)
                    text, tokens = reply.text, reply.tokens
                why = f"ended by {reply.finish_reason}"
        except KeyboardInterrupt:
            pass
        seconds = time.perf_counter() - started
        self.turns_since_seed += 1
        if text:
            self.turns.append((question, text))
        print(f"\n[{tokens} tokens, {tokens / seconds:.0f} tokens/s, {why}]", flush=True)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            print(HELP)
        elif name == "/clear":
            self.turns = []
            print("forgotten")
        elif name == "/seed":
            self.set("seed", rest)
        elif name == "/set" and rest:
            self.set(*rest.partition("=")[::2])
        elif name == "/set":
            print(" ".join(f"{key}={value}" for key, value in self.values().items()))
        elif name == "/save":
            self.save(rest)
        else:
            raise ValueError(f"unknown command {name}; /help lists them")

    def values(self) -> dict:
        return vars(self.sampling) | {"max_new_tokens": self.max_new_tokens, "history": self.history}

    def set(self, name: str, text: str) -> None:
        name = name.strip()
        if name not in self.values():
            raise ValueError(f"unknown setting {name!r}; there are {', '.join(self.values())}")
        value = parse_value(text.strip(), "/seed 42" if name == "seed" else "/set temperature=0.5")
        if name in ("max_new_tokens", "history"):
            lowest = 1 if name == "max_new_tokens" else 0
            if type(value) is not int or value < lowest:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {lowest}")
            setattr(self, name, value)
        else:
            self.sampling = replace(self.sampling, **{name: value})
            self.turns_since_seed = 0 if name == "seed" else self.turns_since_seed
        print(f"{name}={value}")

    def save(self, file: str) -> None:
        if not file or not self.turns:
            raise ValueError("write /save FILE" if not file else "there is nothing to save yet")
        path = Path(os.path.expanduser(file))
        if path.exists():
            raise ValueError(f"{path} exists; give another name")
        messages = conversation([], self.turns, self.system)
        with atomic_write(path, "w") as out:
            out.write(json.dumps({"conversations": messages}, ensure_ascii=False) + "\n")
        print(f"saved {len(self.turns)} turn(s) to {path}")


def parse_value(text: str, example: str) -> object:
    """A number from what was typed; nothing typed is ever executed."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{text!r} is not a number; write for example {example}") from None


if __name__ == "__main__":
    run_main(main)
