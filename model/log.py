"""What a run tells: a console line per interval, a progress bar, the same records as JSON lines, wandb if asked."""

import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from model.checkpoint import atomic_write, versions
from model.model import Transformer
from model.runtime import Run, measure_peak_flops, peak_memory_bytes


def training_flops_per_token(model: Transformer, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token: 6 a weight (4 if frozen), and causal attention.

    Source: Chowdhery et al. 2022, "PaLM", appendix B, with half of its attention term, since attention is causal.
    """
    active = model.num_parameters(active=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 4 * active + 2 * min(active, trained) + 6 * model.config.n_layers * model.config.dim * seq_len


class Log:
    """The log of one training run; only rank 0 writes."""

    def __init__(self, run: Run, path: Path, args, model: Transformer, total_steps: int, start_step: int):
        self.run, self.path, self.total_steps = run, path, total_steps
        self.interval = args.log_interval
        self.flops_per_token = training_flops_per_token(model, args.max_seq_len)
        self.peak_flops = measure_peak_flops(run.device, run.dtype) * run.world_size
        self.last: dict = {}  # the newest record of every kind, for the metadata beside the weights
        self.general_before = 0.0  # loss on general instructions before training
        self.wandb = None
        self.file = None
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc=path.stem,
            dynamic_ncols=True,
            disable=not (run.is_main and sys.stderr.isatty()),
        )
        self._start_interval()
        if not run.is_main:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        about = dict(
            type="run",
            step=start_step,
            args=vars(args),
            config=model.config.to_dict(),
            parameters=model.num_parameters(),
            device=str(run.device),
            dtype=str(run.dtype),
            world_size=run.world_size,
            peak_tflops=round(self.peak_flops / 1e12, 3),
            versions=versions(),
        )
        # written with the first step: a run that fails before it leaves the log of the weights that are there
        kept = kept_records(path, start_step) if start_step else []
        self.head = [*kept, json.dumps(about, ensure_ascii=False)]
        for record in map(json.loads, kept):
            self.last[record["type"]] = record
            if record["type"] == "general":
                self.general_before = self.general_before or record["loss"]
        if args.use_wandb:
            self._start_wandb(args)

    def _start_interval(self) -> None:
        self.loss_sum = self.aux_sum = self.norm_sum = 0.0
        self.more_sums: dict[str, float] = {}
        self.tokens = self.steps = 0
        self.started = time.perf_counter()

    def _start_wandb(self, args) -> None:
        """wandb is a guest: without login it records offline, and no failure of it stops the run."""
        try:
            import wandb

            if not os.environ.get("WANDB_MODE") and not wandb.api.api_key:
                os.environ["WANDB_MODE"] = "offline"
                self.run.print(f"wandb: not logged in, recording offline under {self.path.parent}/wandb")
            name = args.wandb_run_name or f"{self.path.stem}-bs{args.batch_size}-lr{args.learning_rate}"
            self.wandb = wandb.init(project=args.wandb_project, name=name, config=vars(args), dir=str(self.path.parent))
        except Exception as error:
            self.run.print(f"wandb: {type(error).__name__}: {error}; training goes on without it")

    def _write(self, kind: str, **record) -> None:
        record = {"type": kind} | record
        self.last[kind] = record
        if self.run.is_main and record["step"] == 0:  # before training: goes in with the first step
            self.head.append(json.dumps(record, ensure_ascii=False))
        elif self.run.is_main:
            if not self.file:
                with atomic_write(self.path, "w") as file:
                    file.writelines(line + "\n" for line in self.head)
                self.file = open(self.path, "a", encoding="utf-8")
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
        if self.wandb:
            numbers = {f"{kind}/{key}": value for key, value in record.items() if isinstance(value, (int, float))}
            try:
                self.wandb.log(numbers, step=record["step"])
            except Exception as error:
                self.print(f"wandb: {type(error).__name__}: {error}; training goes on without it")
                self.wandb = None

    def print(self, text: str) -> None:
        """A line above the progress bar."""
        if self.run.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def step(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: float,
        aux: float,
        load: list[float] | None,
        **more: float,
    ) -> None:
        """Takes the figures of optimizer step `step` (counted from 1); prints means at every interval and step 1.

        loss: mean over the step's target tokens or pairs, of all ranks. tokens: its inputs that are not padding.
        aux, load: the MoE balance loss and each expert's share. more: what else a stage has to tell.
        """
        self.loss_sum += loss
        self.aux_sum += aux
        self.norm_sum += grad_norm
        self.more_sums = {name: self.more_sums.get(name, 0.0) + value for name, value in more.items()}
        self.tokens += tokens
        self.steps += 1
        self.bar.update()
        if step % self.interval and step not in (1, self.total_steps):
            return
        seconds = time.perf_counter() - self.started
        speed = self.tokens / seconds
        record = dict(
            step=step,
            loss=round(self.loss_sum / self.steps, 6),
            lr=lr,
            grad_norm=round(self.norm_sum / self.steps, 4),
            tokens_per_second=round(speed, 1),
            mfu=round(speed * self.flops_per_token / self.peak_flops, 4),
            memory_gib=round(peak_memory_bytes(self.run.device) / 2**30, 3),
            eta_minutes=round((self.total_steps - step) * seconds / self.steps / 60, 2),
        )
        means = {name: round(total / self.steps, 5) for name, total in self.more_sums.items()}
        record |= means
        extra = "".join(f" | {name.replace('_', ' ')} {value:.3f}" for name, value in means.items())
        if load is not None:
            record |= dict(aux_loss=round(self.aux_sum / self.steps, 6), expert_load=[round(x, 4) for x in load])
            extra += f" | aux {record['aux_loss']:.4f} | load {' '.join(f'{x:.2f}' for x in load)}"
        self._write("step", **record)
        self.print(
            f"step {step:05d}/{self.total_steps:05d} | loss {record['loss']:.4f} | lr {lr:.2e} | "
            f"gnorm {record['grad_norm']:.2f} | {speed:,.0f} tok/s | mfu {record['mfu']:.0%} | "
            f"mem {record['memory_gib']:.1f}GiB | eta {record['eta_minutes']:.1f}m{extra}"
        )
        self._start_interval()

    def validation(
        self, step: int, *, loss: float, bits_per_byte: float, tokens: int, seconds: float, kind: str = "val"
    ) -> None:
        """Takes the held-out figures after `step` steps: nats a token, bits a byte of text.

        kind: val for text of the kind that is trained; general for what the model could before and should keep.
        """
        perplexity = math.exp(min(loss, 50.0))
        figures = {"loss": round(loss, 6), "perplexity": round(perplexity, 4)}
        self._write(kind, step=step, **figures, bits_per_byte=round(bits_per_byte, 5), tokens=tokens)
        name, change = "held-out", ""
        if kind == "general":
            self.general_before = self.general_before or loss
            name = "general instructions"
            if step:
                change = f" | {loss / self.general_before - 1:+.1%} from {self.general_before:.4f} before training"
        self.print(
            f"{name} after step {step} | loss {loss:.4f} | ppl {perplexity:.2f} | "
            f"{bits_per_byte:.4f} bits/byte | {tokens:,} tokens in {seconds:.1f}s{change}"
        )
        self.started += seconds  # tokens per second are those of training

    def pairs(self, step: int, seconds: float, **figures: float) -> None:
        """Takes the figures of held-out preference pairs after `step` steps."""
        self._write("val", step=step, **{name: round(value, 5) for name, value in figures.items()})
        text = " | ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())
        self.print(f"held-out pairs after step {step} | {text} | in {seconds:.1f}s")
        self.started += seconds

    def figures(self) -> dict:
        """The newest training and held-out losses, for the metadata beside the weights."""
        train, val = self.last.get("step", {}), self.last.get("val", {})
        figures = {
            "train": {key: train[key] for key in ("step", "loss", "tokens_per_second", "expert_load") if key in train},
            "val": {key: value for key, value in val.items() if key != "type"},
        }
        if "general" in self.last:
            figures["general"] = {"loss": self.last["general"]["loss"], "loss_before": round(self.general_before, 6)}
        return figures

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:
                self.run.print(f"wandb: {type(error).__name__}: {error}")


def kept_records(path: Path, start_step: int) -> list[str]:
    """The lines of an interrupted run's log up to the step it resumes from; a half-written last line goes."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= start_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
