"""Fixtures shared by the tests: data that is not in the repository, and models small enough to be exact about."""

import signal
from pathlib import Path

import pytest
import torch

from model.LMConfig import LMConfig
from model.model import Transformer

REPO = Path(__file__).resolve().parents[1]


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
