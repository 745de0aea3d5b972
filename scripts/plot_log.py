"""Draws the logs of one or several training runs: loss, held-out loss, learning rate, tokens per second.

    python scripts/plot_log.py pretrain_256
    python scripts/plot_log.py out/pretrain_512.jsonl out/full_sft_512.jsonl --output curves.png

A run is given as the path of its .jsonl or as its name in --out_dir. It may still be training.

画出一次或多次训练的日志：训练损失、验证损失、学习率、每秒词元数；可在训练途中使用。
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, no display needed
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model.cli import ROOT, run_main  # noqa: E402

PANELS = (  # title, type of record, its key, unit
    ("training loss", "step", "loss", "nats per token"),
    ("held-out loss", "val", "loss", "nats per token"),
    ("learning rate", "step", "lr", ""),
    ("speed", "step", "tokens_per_second", "tokens per second"),
)


def find_log(name: str, out_dir: Path) -> Path:
    """The .jsonl meant by a path, or by a run's name in out_dir. Raises: ValueError that lists the logs there are."""
    candidates = [Path(name), out_dir / f"{name.removesuffix('.jsonl')}.jsonl"]
    for path in candidates:
        if path.is_file():
            return path
    there = ", ".join(sorted(path.stem for path in out_dir.glob("*.jsonl"))) or "none"
    raise ValueError(f"no log {name!r}; logs in {out_dir}: {there}")


def read_log(path: Path) -> list[dict]:
    """The records of a log; a line that was not written whole, as the last one of a running training, is left out.

    Raises: ValueError when the file holds no training step.
    """
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            record["step"], record["type"]
        except (ValueError, KeyError, TypeError):
            continue
        records.append(record)
    if not any(record["type"] == "step" for record in records):
        raise ValueError(f"{path} holds no training steps: not a training log, or the run has just started")
    return records


def labels(paths: list[Path]) -> list[str]:
    """A name for every run: the file's, with its folder where two files have the same."""
    stems = [path.stem for path in paths]
    return [f"{p.resolve().parent.name}/{p.stem}" if stems.count(p.stem) > 1 else p.stem for p in paths]


def draw(runs: dict[str, list[dict]], output: Path) -> None:
    """Writes the four panels, with a line for every run, to the image file `output`."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), dpi=120, layout="constrained", sharex=True)
    for axis, (title, kind, key, unit) in zip(axes.flat, PANELS, strict=True):
        for i, (label, records) in enumerate(runs.items()):
            points = [(r["step"], r[key]) for r in records if r["type"] == kind and key in r]
            if not points:
                continue
            few = len(points) <= 30
            axis.plot(*zip(*points, strict=True), color=f"C{i}", label=label, lw=1.5, marker="o" if few else "", ms=3.5)
            if kind == "val":
                axis.annotate(f"{points[-1][1]:.3f}", points[-1], (-4, 6), textcoords="offset points", ha="right",
                              fontsize=9, color=f"C{i}")
        axis.set_title(title, fontsize=11, pad=10)
        axis.set_ylabel(unit)
        axis.set_xlim(left=0)
        axis.margins(y=0.12)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="gray")
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    axes[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[1, 1].set_ylim(bottom=0)
    axes[1, 1].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0, 0].legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="path of a .jsonl, or a name such as pretrain_512")
    parser.add_argument("--out_dir", default=ROOT / "out", type=Path, help="where names are looked up (default: out)")
    parser.add_argument("--output", type=Path, help=".png, .svg or .pdf to write (default: beside the first log)")
    args = parser.parse_args(argv)

    paths = [find_log(name, args.out_dir) for name in args.logs]
    output = args.output or paths[0].with_suffix(".png")
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output {output}: an image's name ends in .png, .svg or .pdf")
    draw(dict(zip(labels(paths), map(read_log, paths), strict=True)), output)
    print(output)


if __name__ == "__main__":
    run_main(main)
