"""What the tests of the training stages share: running a stage, its flags, what it wrote."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import torch

from model.runtime import Run

REPO = Path(__file__).resolve().parent.parent
TINY = ["--override", "dim=32", "n_layers=2", "n_heads=4", "n_kv_heads=2"]


def stage(name: str):
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), REPO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def flags(data_dir: Path, out: Path, *more: str, data: str = "pretrain_data") -> list[str]:
    common = ["--max_seq_len", "64", "--device", "cpu", "--dtype", "float32", "--log_interval", "1"]
    val = data.replace("_data", "_val")
    paths = ["--data_path", str(data_dir / f"{data}.csv"), "--val_path", str(data_dir / f"{val}.csv")]
    return [*paths, "--out_dir", str(out), *common, *more]


def pretrain(data_dir: Path, out: Path, *more: str) -> int:
    return stage("1-pretrain")(flags(data_dir, out, *TINY, *more))


def command(script: str, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> list[str]:
    return [*launcher, str(REPO / script), *arguments]


def weights(out: Path, name: str = "pretrain_32") -> dict[str, torch.Tensor]:
    return torch.load(out / f"{name}.pth", weights_only=True)


def assert_same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def log_rows(out: Path, name: str = "pretrain_32", kind: str = "step") -> list[dict]:
    rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in rows if row["type"] == kind]


def read_step(out: Path) -> int:
    """The last step in a run's log, which may be half written; 0 without one."""
    log = out / "pretrain_32.jsonl"
    steps = re.findall(r'"type": "step", "step": (\d+),', log.read_text()) if log.exists() else []
    return int(steps[-1]) if steps else 0


def stop_after(step: int, train_it) -> None:
    """Runs a stage and asks it to stop, as a signal does, after that many steps."""
    real, turns = Run.should_stop, []

    def should_stop(self):
        turns.append(1)
        self.stop_requested = "SIGTERM" if len(turns) == step else None
        return real(self)

    Run.should_stop = should_stop
    try:
        assert train_it() == 143
    finally:
        Run.should_stop = real
