"""DPO: the loss by hand and against trl, the reference, what the stage writes and logs."""

import importlib.util
import json
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from stages import REPO, assert_same, flags, log_rows, stop_after, weights

from model.checkpoint import load_model, read_meta
from model.dataset import IGNORE, DPOData, SFTData
from model.preference import FIGURES, Reference, Scores, figures, score
from model.runtime import Run
from model.tokenizer import load_tokenizer

spec = importlib.util.spec_from_file_location("dpo_train", REPO / "5-dpo_train.py")
dpo_train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dpo_train)


def settings(**values) -> Namespace:
    return Namespace(**({"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0} | values))


def scores(log_ratios: torch.Tensor, lengths=(2.0, 4.0)) -> Scores:
    return Scores(log_ratios - 3, log_ratios, torch.tensor(lengths), torch.zeros(1), torch.zeros(()))


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize(
    "values, expected, slope",
    [  # one pair, log-ratios +1 and -3: h = 4; slope = d loss / d log-ratio of the chosen, derived on paper
        ({}, math.log(1 + math.exp(-0.4)), -0.1 / (1 + math.exp(0.4))),
        ({"beta": 0.5}, math.log(1 + math.exp(-2)), -0.5 / (1 + math.exp(2))),
        (
            {"label_smoothing": 0.2},
            0.8 * math.log(1 + math.exp(-0.4)) + 0.2 * math.log(1 + math.exp(0.4)),
            -0.1 * (0.8 / (1 + math.exp(0.4)) - 0.2 / (1 + math.exp(-0.4))),
        ),
        ({"loss": "hinge"}, 1 - 0.4, -0.1),
        ({"loss": "hinge", "beta": 0.3}, 0.0, 0.0),
        # means a token: 1/2 and -3/4, h = 1.25, 1 / (2 beta) = 5
        ({"loss": "ipo"}, (1.25 - 5) ** 2, 2 * (1.25 - 5) / 2),
    ],
)
def test_loss_and_gradient_are_those_derived_by_hand(values, expected, slope):
    log_ratios = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss = dpo_train.preference_loss(scores(log_ratios), settings(**values))
    assert loss.shape == (1,) and loss.item() == pytest.approx(expected, rel=1e-6)
    loss.sum().backward()
    assert log_ratios.grad[0].item() == pytest.approx(slope, rel=1e-6)
    rejected = slope / 2 if values.get("loss") == "ipo" else slope  # of 4 tokens, the chosen has 2
    assert log_ratios.grad[1].item() == pytest.approx(-rejected, rel=1e-6)


def test_equal_models_give_ln_2():
    loss = dpo_train.preference_loss(scores(torch.zeros(2)), settings())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_figures_by_hand():
    found = figures(scores(torch.tensor([1.0, -3.0])), torch.tensor([0.5]), 0.1)
    wanted = dict(loss=0.5, margin=0.4, accuracy=1, chosen_reward=0.1, rejected_reward=-0.3, kl=0)
    wanted |= dict(chosen_logp=-2, rejected_logp=-6)
    assert dict(zip(FIGURES, found.tolist(), strict=True)) == pytest.approx(wanted)
    tie = figures(scores(torch.tensor([0.0, 0.0])), torch.tensor([0.5]), 0.1)
    assert tie[FIGURES.index("accuracy")] == 0.5


# --------------------------------------------------------------------------------- scores and the reference


@pytest.fixture
def run() -> Run:
    names = dict(device="cpu", dtype="float32", seed=1, fsdp=False, deepspeed=None, cpu_offload=False, local_rank=None)
    return Run(Namespace(**names))


@pytest.fixture
def pairs(data_dir) -> DPOData:
    return DPOData(data_dir / "dpo" / "train_data.json", load_tokenizer(), 64)


def changed(model):
    """A copy of a model whose weights have moved a little."""
    import copy

    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def test_scores_are_those_of_every_answer_computed_alone(run, pairs, tiny_model):
    model = tiny_model(vocab_size=6400)
    other = changed(model)
    reference = Reference(run, model, {"train": pairs}, None, {})
    batch = pairs.rows(0, 0, 5)
    found = score(run, other, reference, "train", batch)
    assert (batch.documents == 0).any()  # there is padding to leave out
    for i in range(10):
        length = int((batch.documents[i] > 0).sum())
        ids, labels = batch.input_ids[i, :length], batch.labels[i, :length]
        sums = []
        for each in (other, model):
            log_p = each(ids[None])[0][0].log_softmax(-1)
            sums.append(sum(log_p[t, labels[t]].item() for t in range(length) if labels[t] != IGNORE))
        assert found.log_probs[i].item() == pytest.approx(sums[0], rel=1e-5)
        assert found.log_ratios[i].item() == pytest.approx(sums[0] - sums[1], abs=1e-3)
        assert found.lengths[i] == (labels != IGNORE).sum()
    assert (found.kl > 0).all()


def test_a_batch_past_the_end_leaves_its_padding_out(run, pairs, tiny_model):
    model = tiny_model(vocab_size=6400)
    reference = Reference(run, model, {"train": pairs}, None, {})
    batch = pairs.rows(0, pairs.num_rows - 2, pairs.num_rows + 3)
    found = score(run, changed(model), reference, "train", batch)
    assert [len(x) for x in found[:4]] == [4, 4, 4, 2] and torch.isfinite(found.log_ratios).all()
    nothing = score(run, model, reference, "train", pairs.rows(0, pairs.num_rows, pairs.num_rows + 3))
    assert [len(x) for x in nothing[:4]] == [0, 0, 0, 0]


def test_the_kl_estimate_is_exact_over_what_the_reference_samples():
    """The mean of r ln r - r + 1 over the reference's own distribution is KL(p || p_ref)."""
    p, p_ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    log_r = p.log() - p_ref.log()
    assert (p_ref * (log_r.exp() * (log_r - 1) + 1)).sum() == pytest.approx(F.kl_div(p_ref.log(), p, reduction="sum"))


def test_cached_reference_is_the_live_one_and_is_made_once(run, pairs, tiny_model, tmp_path):
    model, cache = tiny_model(vocab_size=6400), tmp_path / "ref.pth"
    live = Reference(run, model, {"train": pairs}, None, {})
    cached = Reference(run, model, {"train": pairs}, cache, {"weights": "a"})
    assert cached.model is None
    for batch in (pairs.rows(0, 3, 8), pairs.rows(1, 86, 94), pairs.in_order(0, 4)):
        torch.testing.assert_close(
            cached.log_probs("train", batch), live.log_probs("train", batch), rtol=1e-5, atol=1e-5
        )
    other = changed(model)
    again = Reference(run, other, {"train": pairs}, cache, {"weights": "a"})  # the table, not the model, answers
    batch = pairs.rows(0, 0, 4)
    assert torch.equal(again.log_probs("train", batch), cached.log_probs("train", batch))
    anew = Reference(run, other, {"train": pairs}, cache, {"weights": "b"})  # other weights: made again
    assert not torch.allclose(anew.log_probs("train", batch), cached.log_probs("train", batch))
    cache.write_bytes(b"damaged")
    repaired = Reference(run, model, {"train": pairs}, cache, {"weights": "a"})
    assert torch.equal(repaired.log_probs("train", batch), cached.log_probs("train", batch))


# ------------------------------------------------------------------------------------------------ the stage


def train(data_dir, base, out, *more: str) -> int:
    arguments = flags(data_dir, out, "--init_from", str(base), "--batch_size", "6", *more)
    paths = {"--data_path": data_dir / "dpo/train_data.json", "--val_path": data_dir / "dpo/val_data.json"}
    for flag, path in paths.items():
        arguments[arguments.index(flag) + 1] = str(path)
    return dpo_train.main([*arguments, "--general_path", str(data_dir / "sft_val.csv")])


def test_the_stage_starts_at_ln_2_and_learns_the_preference(data_dir, sft_weights, tmp_path):
    assert train(data_dir, sft_weights, tmp_path, "--epochs", "3", "--learning_rate", "1e-3") == 0
    rows, val = log_rows(tmp_path, "rl_32"), log_rows(tmp_path, "rl_32", "val")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert val[0]["step"] == 0 and val[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert val[0]["accuracy"] == pytest.approx(0.5, abs=0.2) and val[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert val[-1]["accuracy"] > 0.9 and val[-1]["margin"] > 0.5 and val[-1]["loss"] < 0.5 and val[-1]["kl"] > 0
    assert set(FIGURES) <= rows[-1].keys() and set(FIGURES) <= val[-1].keys()
    general = log_rows(tmp_path, "rl_32", "general")
    assert [row["step"] for row in general] == [0, rows[-1]["step"]]
    meta = read_meta(tmp_path / "rl_32.pth")
    assert meta["stage"] == "rl" and meta["general"]["loss_before"] == general[0]["loss"]
    model, _ = load_model(tmp_path / "rl_32.pth", tokenizer=load_tokenizer())
    assert torch.equal(model.output.weight, model.tok_embeddings.weight)


def test_the_default_learning_rate_moves_it(data_dir, sft_weights, tmp_path):
    assert train(data_dir, sft_weights, tmp_path, "--epochs", "2") == 0
    assert log_rows(tmp_path, "rl_32", "val")[-1]["loss"] < math.log(2) - 0.02


@pytest.mark.parametrize("more", [["--ref_cache", ""], ["--lora", "x"]], ids=["live", "adapter"])
def test_a_live_reference_and_a_cached_one_give_the_same_run(more, data_dir, sft_weights, tmp_path):
    steps = ["--max_steps", "6", "--learning_rate", "1e-3"]
    assert train(data_dir, sft_weights, tmp_path, *steps, *more) == 0
    name = "lora_x_32" if "--lora" in more else "rl_32"
    assert (tmp_path / f"{name}_ref.pth").exists() == ("--lora" in more)
    other = tmp_path / "other"
    more = [*more, "--ref_cache", ""] if "--lora" in more else []
    assert train(data_dir, sft_weights, other, *steps, *more) == 0
    for row, same in zip(log_rows(tmp_path, name), log_rows(other, name), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)
    if name != "rl_32":
        assert not (tmp_path / "rl_32.pth").exists()
        assert all("lora" in key for key in weights(tmp_path, name)) and read_meta(tmp_path / f"{name}.pth")["lora"]


def test_resume_is_bit_identical(data_dir, sft_weights, tmp_path):
    steps = ["--epochs", "1", "--save_interval", "1", "--learning_rate", "1e-3"]
    assert train(data_dir, sft_weights, tmp_path / "whole", *steps) == 0
    stop_after(7, lambda: train(data_dir, sft_weights, tmp_path / "half", *steps))
    assert read_meta(tmp_path / "half" / "rl_32.pth")["step"] == 7
    with pytest.raises(ValueError, match="beta was 0.1, now it is 0.2"):
        train(data_dir, sft_weights, tmp_path / "half", *steps, "--resume", "--beta", "0.2")
    assert train(data_dir, sft_weights, tmp_path / "half", *steps, "--resume") == 0
    assert_same(weights(tmp_path / "whole", "rl_32"), weights(tmp_path / "half", "rl_32"))
    before = [[row["general"] for row in [read_meta(tmp_path / out / "rl_32.pth")]] for out in ("whole", "half")]
    assert before[0] == before[1]  # the figure from before training outlives the stop


@pytest.mark.parametrize("more", [["--loss", "ipo"], ["--loss", "hinge"], ["--label_smoothing", "0.1"]])
def test_the_other_losses_train(more, data_dir, sft_weights, tmp_path):
    assert train(data_dir, sft_weights, tmp_path, "--epochs", "2", "--learning_rate", "1e-3", *more) == 0
    assert log_rows(tmp_path, "rl_32", "val")[-1]["accuracy"] > 0.85


def test_sft_coef_trains_the_chosen_answers_for_themselves(data_dir, sft_weights, tmp_path):
    """What the chosen share with the rejected, how an answer ends, becomes likelier too."""
    rejected = []
    for coef in ("0", "30"):
        more = ["--epochs", "2", "--learning_rate", "1e-3", "--sft_coef", coef]
        assert train(data_dir, sft_weights, tmp_path / coef, *more) == 0
        rejected.append(log_rows(tmp_path / coef, "rl_32", "val")[-1]["rejected_logp"])
    assert rejected[1] > rejected[0] + 1


def test_bad_settings_are_one_line(data_dir, sft_weights, tmp_path, capsys):
    bad = [["--loss", "ipo", "--label_smoothing", "0.1"], ["--beta", "0"], ["--label_smoothing", "0.5"]]
    bad += [["--rank", "4"], ["--target", "wq"], ["--lora", "a,b"], ["--lora", "lora_x"]]
    for more in bad:
        with pytest.raises(SystemExit) as stopped:
            train(data_dir, sft_weights, tmp_path, *more)
        assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- against trl


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_the_curve_is_that_of_trl(loss, data_dir, sft_weights, tmp_path):
    """20 steps of trl's DPOTrainer on the exported model: the same pairs, order, AdamW and learning rates."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.checkpoint import read_base
    from model.hf import save_folder
    from model.optim import cosine_lr

    size, num_steps, peak = 4, 20, 2e-4
    more = ["--max_steps", str(num_steps), "--learning_rate", str(peak), "--warmup_steps", "2", "--loss", loss]
    more += ["--batch_size", str(size)]
    assert train(data_dir, sft_weights, tmp_path, *more) == 0
    ours = [row["loss"] for row in log_rows(tmp_path, "rl_32")]

    tokenizer = load_tokenizer()
    state, config, _ = read_base(sft_weights)
    save_folder(tmp_path / "hf", state, config, tokenizer)
    data = DPOData(data_dir / "dpo" / "train_data.json", tokenizer, 64)
    records = json.loads((data_dir / "dpo" / "train_data.json").read_text(encoding="utf-8"))
    order = data.rows(0, 0, num_steps * size).pairs.tolist()
    rows = [
        {
            "prompt": tokenizer.render([{"role": "user", "content": records[i]["prompt"]}]),
            "chosen": records[i]["chosen"] + "</s>",
            "rejected": records[i]["rejected"] + "</s>",
        }
        for i in order
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    hf_tokenizer.pad_token = "<unk>"
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_lr(step, num_steps, 2, 1.0))

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=size,
            max_steps=num_steps,
            beta=0.1,
            loss_type=loss,
            max_grad_norm=1.0,
            logging_steps=1,
            logging_first_step=True,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=65,  # our rows of 64 inputs have 65 ids with the last label
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=hf_tokenizer,
        optimizers=(optimizer, schedule),
    )
    for i, row in zip(order, trainer.train_dataset, strict=True):  # the same ids, to be exact about the rest
        pair = data.in_order(i, i + 1)
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            ids = pair.input_ids[side, : int((pair.documents[side] > 0).sum())].tolist()
            assert (row["prompt_ids"] + row[name])[:65][:-1] == ids
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == num_steps
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert abs(ours[-1] - ours[0]) > 0.1 * abs(ours[0])  # there was something to agree on


def test_data_that_is_no_pairs_is_refused(data_dir, tmp_path):
    with pytest.raises(ValueError, match="pairs"):
        DPOData(data_dir / "sft_data.csv", load_tokenizer(), 64)
    assert SFTData(data_dir / "sft_data.csv", load_tokenizer(), 64).num_rows
