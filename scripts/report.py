"""Says how good the models of a quickstart are: held-out figures, scored answers, sample conversations.

    python scripts/report.py --size tiny

Reads   out/pretrain_{dim}.json, out/full_sft_{dim}.pth with .json; dataset/sft_data.csv, sft_val.csv, sft_val_new.csv
Writes  out/report_{dim}.json

给出模型的好坏：验证集损失、对训练过的与未见过的问题的回答得分、几段示例对话。
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tqdm import tqdm  # noqa: E402

from model.checkpoint import atomic_write, find_adapters, find_weights, load_model, read_meta  # noqa: E402
from model.cli import ROOT, add_lora_flag, add_place_flags, positive_int, run_main  # noqa: E402
from model.dataset import read_records, to_messages  # noqa: E402
from model.generate import prepare, stream  # noqa: E402
from model.LMConfig import SIZES  # noqa: E402
from model.model import Transformer  # noqa: E402
from model.runtime import pick_device, pick_dtype  # noqa: E402
from model.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

GROUPS = {  # file under dataset/: what its questions are to the model
    "sft_data.csv": "questions it was trained on",
    "sft_val.csv": "the same facts, asked in other words",
    "sft_val_new.csv": "facts it was not taught",
}
MAX_NEW_TOKENS = 256
BATCH_SIZE = 20


def character_f1(answer: str, reference: str) -> float:
    """F1 of the characters two texts share, 0 to 1: 2PR / (P + R), a character counted as often as both have it.

    Precision P is the shared characters over those of the answer, recall R over those of the reference. Letters
    and digits of all scripts count, in lower case; spaces, punctuation and symbols do not, since they would make
    any two sentences alike. Order does not count. Two texts without characters are equal: 1.
    """
    bags = [Counter(c for c in text.lower() if c.isalnum()) for text in (answer, reference)]
    total = sum(bag.total() for bag in bags)
    return 2 * (bags[0] & bags[1]).total() / total if total else 1.0


def read_shuffled(path: Path, seed: int) -> list[list[dict]]:
    """The conversations of a file in random order; none if there is no such file."""
    if not path.exists():
        return []
    conversations = [to_messages(record) for _, record in read_records(path, lambda *fault: None)]
    random.Random(seed).shuffle(conversations)
    return conversations


class Answerer:
    """A model that answers greedily, in batches of about equally long conversations."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, num_answers: int):
        self.model, self.tokenizer = model, tokenizer
        self.bar = tqdm(total=num_answers, unit="answer", desc="answers", disable=not sys.stderr.isatty())

    def __call__(self, conversations: list[list[dict]]) -> list[tuple[str, bool]]:
        """(answer, whether the model ended it itself) to the last question of every conversation."""
        prompts = [self.tokenizer.encode_chat(messages) for messages in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [("", False)] * len(prompts)
        for start in range(0, len(order), BATCH_SIZE):
            part = order[start : start + BATCH_SIZE]
            settings = {"tokenizer": self.tokenizer, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0}
            for row, _, reply in stream(self.model, [prompts[i] for i in part], **settings):
                if reply.finish_reason:
                    answers[part[row]] = reply.text, reply.finish_reason == "stop"
                    self.bar.update()
        return answers


def score(answerer: Answerer, conversations: list[list[dict]]) -> dict:
    """How the answers to the last questions of the conversations compare with the answers these have."""
    answers = answerer([messages[:-1] for messages in conversations])
    scores = [character_f1(answer, c[-1]["content"]) for (answer, _), c in zip(answers, conversations, strict=True)]
    return {
        "questions": len(scores),
        "share_f1_half": sum(f1 >= 0.5 for f1 in scores) / len(scores),
        "mean_f1": sum(scores) / len(scores),
        "share_ended": sum(ended for _, ended in answers) / len(answers),
        "answers": [
            {"question": c[-2]["content"], "reference": c[-1]["content"], "answer": answer, "f1": round(f1, 4)}
            for c, (answer, _), f1 in zip(conversations, answers, scores, strict=True)
        ],
    }


def sample_questions(groups: dict[str, list[list[dict]]]) -> list[tuple[str, list[str]]]:
    """(where it is from, the user's turns) of six conversations: who are you, then the first of each kind there is."""
    trained, reworded, new = (groups[name] for name in GROUPS)

    def first(conversations: list[list[dict]], wanted) -> list[list[dict]]:
        return [c for c in conversations if wanted(c)][:1]

    def english(c: list[dict]) -> bool:
        return re.search(r"[一-鿿]", c[0]["content"]) is None

    choices = [
        ("trained on", first(trained, lambda c: len(c) == 2 and not english(c))),
        ("trained on", first(trained, lambda c: len(c) > 2 and not english(c))),
        ("trained on", first(trained, english)),
        ("asked in other words", first(reworded, lambda c: not english(c))),
        ("not taught", first(new, lambda c: not english(c))),
    ]
    samples = [("who are you", ["你是谁？", "你能帮我做什么？"])]
    for origin, found in choices:
        samples += [(origin, [m["content"] for m in c if m["role"] == "user"]) for c in found]
    return samples


def talk(answerer: Answerer, questions: list[str]) -> list[dict]:
    """The conversation that comes of the questions, with the model's own answers in between."""
    messages: list[dict] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answerer([messages])[0][0]})
    return messages


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="model size (default: small)")
    parser.add_argument("--questions", type=positive_int, default=100, help="scored of each kind (default: 100)")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "dataset", help="(default: dataset)")
    add_lora_flag(parser)
    add_place_flags(parser)
    args = parser.parse_args(argv)

    tokenizer = load_tokenizer(args.tokenizer_dir)
    weights = {stage: find_weights(stage, args.out_dir, args.size) for stage in ("pretrain", "full_sft")}
    adapters = find_adapters(args.lora, args.out_dir, args.size)
    model, _ = load_model(weights["full_sft"], tokenizer=tokenizer, adapters=adapters)
    device = pick_device(args.device)
    model = prepare(model, device, pick_dtype(args.dtype, device)[0])
    groups = {name: read_shuffled(args.data_dir / name, args.seed) for name in GROUPS}
    drawn = {name: conversations[: args.questions] for name, conversations in groups.items() if conversations}
    samples = sample_questions(groups)

    num_answers = sum(map(len, drawn.values())) + sum(len(questions) for _, questions in samples)
    answerer = Answerer(model, tokenizer, num_answers)
    report = {
        "held_out": {stage: (read_meta(path) or {}).get("val", {}) for stage, path in weights.items()},
        "answers": {name: score(answerer, conversations) for name, conversations in drawn.items()},
        "samples": [{"origin": origin, "messages": talk(answerer, questions)} for origin, questions in samples],
    }
    answerer.bar.close()
    output = Path(args.out_dir) / f"report_{model.config.name_suffix}.json"
    with atomic_write(output, "w") as file:
        json.dump(report, file, ensure_ascii=False, indent=1)
    show(report)
    print(f"\nall answers: {output}")


def show(report: dict) -> None:
    """Prints the report."""
    print(f"{'held-out text':<38}{'loss':>8}{'perplexity':>12}{'bits/byte':>11}{'tokens':>10}")
    for stage, val in report["held_out"].items():
        figures = "not measured"
        if val:
            figures = f"{val['loss']:8.4f}{val['perplexity']:12.2f}{val['bits_per_byte']:11.4f}{val['tokens']:10,}"
        print(f"{stage:<38}{figures}")
    print(f"\n{'answers, greedy':<38}{'F1>=0.5':>8}{'mean F1':>12}{'ended':>11}{'number':>10}")
    for name, r in report["answers"].items():
        figures = f"{r['share_f1_half']:8.0%}{r['mean_f1']:12.2f}{r['share_ended']:11.0%}{r['questions']:10}"
        print(f"{GROUPS[name]:<38}{figures}")
    for sample in report["samples"]:
        print(f"\n-- {sample['origin']}")
        for message in sample["messages"]:
            print(f"{'Q' if message['role'] == 'user' else 'A'}: {message['content']}")


if __name__ == "__main__":
    run_main(main)
