"""Chats with a model behind an OpenAI-compatible API, such as my_openai_api.py serves.

Reads   nothing
Writes  nothing
Run     python chat_openai_api.py                                 a chat; /clear forgets it, /exit or Ctrl-D leaves
        python chat_openai_api.py --api_base http://192.168.1.2:8000/v1 --system 你是一位诗人
        echo 你好 | python chat_openai_api.py                      a question a line

在终端与 OpenAI 兼容接口（例如 my_openai_api.py）后面的模型对话。
读入    无
写出    无
运行    python chat_openai_api.py（对话；/clear 清空对话，/exit 或 Ctrl-D 退出）
        python chat_openai_api.py --api_base http://192.168.1.2:8000/v1 --system 你是一位诗人
        echo 你好 | python chat_openai_api.py（每行一个问题）
"""

import argparse
import contextlib
import os
import sys

import openai

from model.cli import non_negative_float, non_negative_int, positive_int, run_main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--api_base", default="http://127.0.0.1:8000/v1", help="address (default: http://127.0.0.1:8000/v1)")
    add("--api_key", help="key of the server (default: MINIMIND_API_KEY or OPENAI_API_KEY, if set)")
    add("--model", help="name of the model (default: the first one that the server lists)")
    add("--system", help="system message")
    add("--history", type=non_negative_int, default=2, help="earlier turns that are sent along (default: 2)")
    add("--temperature", type=non_negative_float, help="0: always the likeliest (default: the server's)")
    add("--max_tokens", type=positive_int, help="tokens of a reply at most (default: what the context has room for)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    key = args.api_key or os.environ.get("MINIMIND_API_KEY") or os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=args.api_base, api_key=key)
    try:
        Chat(client, args).run()
    except openai.OpenAIError as error:
        raise ValueError(describe(error, args.api_base)) from None


def describe(error: openai.OpenAIError, api_base: str) -> str:
    """What went wrong, in words for the user."""
    if isinstance(error, openai.APIConnectionError):
        return f"no answer from {api_base}; start the server with my_openai_api.py, or give its --api_base"
    body = getattr(error, "body", None)
    return f"{api_base}: {body.get('message') if isinstance(body, dict) else error}"


class Chat:
    """A conversation in the terminal."""

    def __init__(self, client: openai.OpenAI, args: argparse.Namespace):
        self.client, self.args = client, args
        self.model = args.model or client.models.list().data[0].id
        settings = {"temperature": args.temperature, "max_tokens": args.max_tokens}
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.messages: list[dict] = []  # questions and answers by turns

    def run(self) -> None:
        """Reads lines until Ctrl-D or /exit; what is not a command is sent exactly as typed."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lets input() edit a line)
        sys.stdin.reconfigure(errors="replace")
        terminal = sys.stdin.isatty()
        if terminal:
            print(f"{self.model} at {self.args.api_base}; /clear forgets the conversation, Ctrl-D leaves")
        while True:
            try:
                line = input("\n> " if terminal else "")
                if line == "/exit":
                    break
                if line == "/clear":
                    self.messages = []
                    print("forgotten")
                elif line:
                    self.reply(line)
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n[Ctrl-D or /exit leaves]")
            except openai.APIStatusError as error:  # of this question only, for example a full queue
                print(f"error: {describe(error, self.args.api_base)}")

    def reply(self, question: str) -> None:
        """Streams the answer; Ctrl-C ends it, and what was said until then is kept."""
        asked = {"role": "user", "content": question}
        recent = self.messages[-2 * self.args.history :] if self.args.history else []
        messages = [*self.system, *recent, asked]
        text = ""
        with self.client.chat.completions.create(
            model=self.model, messages=messages, stream=True, **self.settings
        ) as stream:
            try:
                for chunk in stream:
                    piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    text += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print("\n[interrupted]", end="")
        print(flush=True)
        if text:
            self.messages += [asked, {"role": "assistant", "content": text}]


if __name__ == "__main__":
    run_main(main)
