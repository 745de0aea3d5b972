"""Log-probabilities of the answers in preference pairs, under the model that is trained and under its reference."""

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.checkpoint import atomic_write, load_tensors, write_tensors
from model.dataset import IGNORE, DPOData, PairBatch
from model.runtime import Run


def hidden(run: Run) -> bool:
    """True where a progress bar has nobody to see it."""
    return not (run.is_main and sys.stderr.isatty())


def token_log_probs(run: Run, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """log p of every scored token, the row of the batch it is in, and the MoE balance loss.

    Shapes: (N,) float32, (N,) int64 in [0, 2P), (); tokens are in row-major order, padding is not among them.
    """
    scored = batch.labels != IGNORE
    with run.autocast():
        logits, aux = model(batch.input_ids, documents=batch.documents, select=scored)  # (N, V)
    log_probs = -F.cross_entropy(logits.float(), batch.labels[scored], reduction="none")
    return log_probs, scored.nonzero()[:, 0], aux


class Reference:
    """The log-probabilities of the model as it was before training: from a table made once, or from a frozen copy.

    The table holds a float32 per scored token, in the order of the file. It is kept in `cache` and used again as
    long as `identity` (weights, data, tokenizer, number format) is the same. With cache None the copy stays in memory.
    """

    def __init__(self, run: Run, model: nn.Module, data: dict[str, DPOData], cache: Path | None, identity: dict):
        self.run, self.model, self.tables = run, None, {}
        if cache is None:
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
            return
        identity = identity | {name: each.fingerprint for name, each in data.items()}
        saved = self._saved(cache, identity) if run.is_main else None
        saved = run.all_gather(saved)[0]
        if not saved:
            saved = {name: self._table(model, each, name) for name, each in data.items()}
            if run.is_main:
                with atomic_write(cache) as file:
                    write_tensors({"identity": identity, "log_probs": saved}, file)
        for name, each in data.items():
            starts = torch.zeros(2 * each.num_rows + 1, dtype=torch.int64)
            torch.cumsum(torch.from_numpy(each.num_answer_tokens()), 0, out=starts[1:])
            self.tables[name] = saved[name], starts

    @staticmethod
    def _saved(cache: Path, identity: dict) -> dict[str, Tensor] | None:
        """The tables in the cache, if they are those of `identity`; what is damaged is made again."""
        try:
            saved = load_tensors(cache)
            return saved["log_probs"] if saved["identity"] == identity else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    @torch.no_grad()
    def _table(self, model: nn.Module, data: DPOData, name: str, size: int = 16) -> Tensor:
        """log p of all scored tokens of the file, chosen and rejected in turn; every rank computes its part."""
        was_training = model.training
        model.eval()
        mine: dict[int, list[Tensor]] = {}
        turns = range(self.run.rank * size, data.num_rows, size * self.run.world_size)
        for start in tqdm(turns, desc=f"reference, {name}", delay=2, leave=False, disable=hidden(self.run)):
            batch = data.in_order(start, start + size).to(self.run.device)
            log_probs, rows, _ = token_log_probs(self.run, model, batch)
            parts = log_probs.cpu().split(torch.bincount(rows.cpu(), minlength=2 * size).tolist())
            for i in range(batch.num_pairs):
                mine[start + i] = [parts[i], parts[size + i]]
        model.train(was_training)
        all_parts = {pair: parts for part in self.run.all_gather(mine) for pair, parts in part.items()}
        return torch.cat([part for pair in range(data.num_rows) for part in all_parts[pair]])

    @torch.no_grad()
    def log_probs(self, name: str, batch: PairBatch) -> Tensor:
        """log p of every scored token of a batch of that data, (N,) float32, in token_log_probs' order."""
        if self.model is not None:
            return token_log_probs(self.run, self.model, batch)[0]
        table, starts = self.tables[name]
        pairs = batch.pairs[batch.pairs >= 0].cpu()
        sequences = torch.cat([2 * pairs, 2 * pairs + 1]).tolist()
        parts = [table[starts[i] : starts[i + 1]] for i in sequences]
        return torch.cat(parts or [table[:0]]).to(batch.labels.device)


class Scores(NamedTuple):
    """What the R pairs of a batch got, padding left out; in the (2R,) tensors first the chosen, then the rejected."""

    log_probs: Tensor  # (2R,) log p of the answers, sums over their tokens
    log_ratios: Tensor  # (2R,) log p / p_ref of the answers, sums
    lengths: Tensor  # (2R,) scored tokens of the answers
    kl: Tensor  # (R,) nats a token of the model from its reference, see score
    aux: Tensor  # () MoE balance loss


FIGURES = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "kl")


def score(run: Run, model: nn.Module, reference: Reference, name: str, batch: PairBatch) -> Scores:
    """Scores of a batch of the data of that name.

    kl: with importance weights r = p / p_ref of every token, the mean of r ln r - r + 1: never negative, and without
    bias as far as the reference could have given these answers. A sampled answer would need a second model.
    """
    log_p, rows, aux = token_log_probs(run, model, batch)
    log_r = log_p - reference.log_probs(name, batch)  # (N,)
    real = (batch.pairs >= 0).repeat(2)  # (2P,)

    def per_answer(tokens: Tensor) -> Tensor:  # (N,) -> (2R,), sums
        return tokens.new_zeros(len(real)).index_add(0, rows, tokens)[real]

    lengths = per_answer(torch.ones_like(log_p))
    with torch.no_grad():
        kl = per_answer(log_r.exp() * (log_r - 1) + 1) / lengths
    return Scores(per_answer(log_p), per_answer(log_r), lengths, sum(kl.chunk(2)) / 2, aux)


@torch.no_grad()
def figures(scores: Scores, losses: Tensor, beta: float) -> Tensor:
    """Sums over the pairs of FIGURES, (8,). A reward is beta log p / p_ref; accuracy counts a tie as half."""
    chosen, rejected = (beta * scores.log_ratios).chunk(2)
    accuracy = (chosen > rejected).float() + 0.5 * (chosen == rejected)
    rows = [losses, chosen - rejected, accuracy, chosen, rejected, *scores.log_probs.chunk(2), scores.kl]
    return torch.stack([row.sum() for row in rows])


@torch.no_grad()
def held_out_pairs(
    run: Run, model: nn.Module, reference: Reference, data: DPOData, batch_size: int, beta: float, loss: Callable
) -> dict[str, float]:
    """FIGURES as means over all pairs of the data named val, over all ranks, and the seconds it took."""
    started, total = time.perf_counter(), torch.zeros(len(FIGURES), device=run.device)
    was_training = model.training
    model.eval()
    together = range(0, data.num_rows, batch_size * run.world_size)  # as many turns on every rank
    for first in tqdm(together, desc="held-out pairs", delay=2, leave=False, disable=hidden(run)):
        start = first + run.rank * batch_size
        scores = score(run, model, reference, "val", data.rows(0, start, start + batch_size).to(run.device))
        total += figures(scores, loss(scores), beta)
    model.train(was_training)
    means = [value / data.num_rows for value in run.sum(total)]
    return dict(zip(FIGURES, means, strict=True)) | {"seconds": time.perf_counter() - started}
