"""Fixtures shared by the tests: data that is not in the repository, and models small enough to be exact about."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from stages import TINY, flags, stage

from model.LMConfig import LMConfig
from model.model import Transformer

REPO = Path(__file__).resolve().parents[1]
WORDS = "春 夏 秋 冬 山 水 风 月 花 鸟 one two three four 学而时习之 不亦说乎 有朋自远方来".split()


# Started in the background of a shell, pytest ignores Ctrl-C, and so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data that is never committed (v1's weights, exams, v1's tokenizer); skips where absent."""
    folder = REPO.parent / "shared/data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent: it holds data that is not part of the repository")
    return folder


@pytest.fixture
def tiny_config():
    """tiny_config(**overrides): two layers, two query heads to one key/value head, 48 token ids."""

    def make(**overrides) -> LMConfig:
        numbers = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, hidden_dim=48, max_seq_len=64)
        return LMConfig(**{**numbers, **overrides})

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """tiny_model(**overrides): such a model in eval mode, its weights large enough that attention is not uniform."""

    def make(**overrides) -> Transformer:
        model = Transformer(tiny_config(**overrides)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
                else:  # norm weights
                    parameter.uniform_(0.5, 1.5)
        return model

    return make


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A pretraining file of 400 short documents, an SFT file of 300 conversations, 90 preference pairs."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choice(WORDS) for _ in range(n))

    for name, count in (("pretrain_data", 400), ("pretrain_val", 20)):
        lines = ["text", *(words(rng.randint(5, 40)) for _ in range(count))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, count in (("sft_data", 300), ("sft_val", 20)):
        rows = [f"[],{words(rng.randint(2, 9))}？,{words(rng.randint(3, 12))}。" for _ in range(count)]
        (folder / f"{name}.csv").write_text("history,q,a\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (folder / "dpo").mkdir()
    for name, count in (("train_data", 90), ("val_data", 21)):
        prompts = [(words(rng.randint(2, 9)) + "？", words(rng.randint(3, 9)) + "。") for _ in range(count)]
        pairs = [{"prompt": prompt, "chosen": chosen, "rejected": "one two"} for prompt, chosen in prompts]
        (folder / "dpo" / f"{name}.json").write_text(json.dumps(pairs), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sft_weights(data_dir, tmp_path_factory):
    """A model that has learned the words of the test data a little."""
    out = tmp_path_factory.mktemp("sft")
    more = ["--epochs", "3", "--batch_size", "8", "--learning_rate", "1e-2", *TINY]
    assert stage("1-pretrain")(flags(data_dir, out, *more)) == 0
    return out / "pretrain_32.pth"
