"""Adapters: model/lora.py, and their files as model/checkpoint.py reads them."""

import json
import re
from pathlib import Path

import pytest
import torch
from stages import assert_same, flags, log_rows, stage, stop_after

from model.checkpoint import file_sha256, find_adapters, load_model, read_adapter, read_base, save_weights
from model.LMConfig import LMConfig
from model.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_state,
    add_adapter,
    load_adapter_state,
    merge_state,
    merged_tensor,
    trainable_table,
)
from model.model import Transformer
from model.tokenizer import load_tokenizer

SEVEN = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
TOKENIZER = load_tokenizer()
IDS = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(5))


def trained(model: Transformer, lora: LoRAConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Adds an adapter to the model, gives it values as after training, and returns these."""
    add_adapter(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return {name: value.clone() for name, value in adapter_state(model).items()}


def save_base(path: Path, model: Transformer, **meta) -> Path:
    about = {"config": model.config.to_dict(), "tokenizer": TOKENIZER.fingerprint}
    save_weights(path, model.state_dict(), about | meta)
    return path


def save_adapter(path: Path, state: dict, lora: LoRAConfig, config: LMConfig, base: Path, **meta) -> Path:
    """Writes an adapter's files as Checkpoint does."""
    about = {
        "config": config.to_dict(),
        "tokenizer": TOKENIZER.fingerprint,
        "lora": lora.to_dict(),
        "base": {"file": base.name, "sha256": file_sha256(base)},
    }
    save_weights(path, state, about | meta)
    return path


@pytest.fixture
def base(tiny_model, tmp_path) -> tuple[Path, Transformer]:
    """A dense model that fits the tokenizer, and its file."""
    model = tiny_model(vocab_size=6400)
    return save_base(tmp_path / "full_sft_32.pth", model), model


@pytest.mark.parametrize("overrides", [{}, {"use_moe": True}], ids=["dense", "moe"])
@pytest.mark.parametrize("targets", [SEVEN, ("all",)], ids=["seven", "all"])
def test_output_is_unchanged_at_step_0(tiny_model, overrides, targets):
    model = tiny_model(**overrides)
    before = model(IDS)[0]
    add_adapter(model, LoRAConfig(rank=4, targets=targets))
    assert any(isinstance(module, LoRALinear) for module in model.modules())
    assert torch.equal(model(IDS)[0], before)


@pytest.mark.parametrize("overrides", [{}, {"use_moe": True}], ids=["dense", "moe"])
def test_training_changes_the_adapter_and_nothing_else(tiny_model, overrides):
    model = tiny_model(**overrides).train()
    lora = LoRAConfig(rank=2, targets=("wq", "w2"), modules_to_save=("ffn_norm", "wv"))
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapter(model, lora)
    start = {name: value.clone() for name, value in adapter_state(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        logits, balance = model(IDS)
        (torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten()) + balance).backward()
        optimizer.step()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == start.keys()
    kinds = {re.sub(r"\.\d+", ".*", name) for name in with_gradient}
    w2 = ["experts.*.w2", "shared_experts.w2"] if overrides else ["w2"]
    low_rank = ["attention.wq", *(f"feed_forward.{name}" for name in w2)]
    assert kinds == {f"layers.*.{name}.lora_{ab}.weight" for name in low_rank for ab in "AB"} | {
        "layers.*.ffn_norm.weight",
        "layers.*.attention.wv.weight",
    }
    for name, value in model.state_dict().items():
        if name in frozen and name not in start:
            assert torch.equal(value, frozen[name]), name
    unchanged = [name for name, value in adapter_state(model).items() if torch.equal(value, start[name])]
    assert not [name for name in unchanged if ".experts." not in name]  # an expert may have got no token


def chosen(model: Transformer, **settings) -> set[str]:
    add_adapter(model, LoRAConfig(**settings))
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def test_targets_are_parts_of_names(tiny_model):
    attention = {f"layers.{i}.attention.{w}" for i in range(2) for w in ("wq", "wk", "wv", "wo")}
    experts = {f"layers.{i}.feed_forward.experts.{j}.w{w}" for i in range(2) for j in range(4) for w in (1, 2, 3)}
    shared = {f"layers.{i}.feed_forward.shared_experts.w{w}" for i in range(2) for w in (1, 2, 3)}
    dense = {f"layers.{i}.feed_forward.w{w}" for i in range(2) for w in (1, 2, 3)}
    assert chosen(tiny_model(), targets=("attention",)) == attention
    assert chosen(tiny_model(), targets=("all",)) == chosen(tiny_model(), targets=SEVEN) == attention | dense
    moe = {"use_moe": True}
    assert chosen(tiny_model(**moe), targets=("experts",)) == experts
    assert chosen(tiny_model(**moe), targets=("shared_experts",)) == shared
    assert chosen(tiny_model(**moe), targets=("feed_forward",)) == experts | shared
    assert chosen(tiny_model(**moe), targets=("w1", "wq")) == {
        name for name in attention | experts | shared if name.endswith((".w1", ".wq"))
    }
    assert chosen(tiny_model(**moe), targets=SEVEN) == attention | experts | shared


def test_unknown_targets_are_named(tiny_model):
    with pytest.raises(ValueError, match="--target: .* no 'q_proj'; it has .*all, attention.*w1, .*wq"):
        add_adapter(tiny_model(), LoRAConfig(targets=("wq", "q_proj")))
    with pytest.raises(ValueError, match="no 'experts'"):
        add_adapter(tiny_model(), LoRAConfig(targets=("experts",)))
    with pytest.raises(ValueError, match="--modules_to_save: .* no 'head'; it has .*norm.*output.*tok_embeddings"):
        add_adapter(tiny_model(), LoRAConfig(modules_to_save=("head",)))
    with pytest.raises(ValueError, match="layers.0.attention.wq is a target and a module to save"):
        add_adapter(tiny_model(), LoRAConfig(targets=("wq",), modules_to_save=("wq",)))


@pytest.mark.parametrize("name", ["output", "tok_embeddings"])
def test_a_tied_tensor_is_no_target(name):
    with pytest.raises(ValueError, match="output shares its tensor .* --modules_to_save tok_embeddings"):
        LoRAConfig(targets=("wq", name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ()}, "at least one target"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize("saved", [("tok_embeddings",), ("output",), ("tok_embeddings", "output")])
def test_tied_weights_stay_one_tensor(tiny_model, saved):
    model = tiny_model().train()
    lora = LoRAConfig(rank=2, targets=("wq",), modules_to_save=saved)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapter(model, lora)
    assert model.output.weight is model.tok_embeddings.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    torch.nn.functional.cross_entropy(model(IDS)[0].flatten(0, 1), IDS.flatten()).backward()
    optimizer.step()
    assert model.output.weight is model.tok_embeddings.weight
    state = adapter_state(model)
    assert [name for name in state if ".lora_" not in name] == ["tok_embeddings.weight"]
    assert not torch.equal(state["tok_embeddings.weight"], base["tok_embeddings.weight"])
    merge_state(base, state, lora.scale)
    assert base["output.weight"] is base["tok_embeddings.weight"]
    assert torch.equal(base["output.weight"], state["tok_embeddings.weight"])
    for name in ("output.weight", "tok_embeddings.weight"):
        assert torch.equal(merged_tensor(name, torch.zeros(48, 32), state, lora.scale), state["tok_embeddings.weight"])


@pytest.mark.parametrize("overrides", [{}, {"use_moe": True}], ids=["dense", "moe"])
@pytest.mark.parametrize("saved", [(), ("tok_embeddings", "attention_norm")], ids=["low_rank", "whole"])
def test_merged_is_unmerged(tiny_model, overrides, saved):
    model = tiny_model(**overrides)
    lora = LoRAConfig(rank=3, alpha=5, modules_to_save=saved)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(IDS)[0]
    adapter = trained(model, lora)
    unmerged = model(IDS)[0]
    assert (unmerged - plain).abs().max() > 0.1
    merge_state(state, adapter, lora.scale)
    merged = Transformer(model.config).eval()
    merged.load_state_dict(state)
    torch.testing.assert_close(merged(IDS)[0], unmerged, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged(IDS)[0].argmax(-1), unmerged.argmax(-1))


def test_the_addition_is_alpha_over_rank_times_b_a():
    adapter = {"x.lora_A.weight": torch.tensor([[1.0, 2.0]]), "x.lora_B.weight": torch.tensor([[3.0], [5.0]])}
    weight = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    lora = LoRAConfig(rank=1, alpha=2)
    merged = merged_tensor("x.weight", weight, adapter, lora.scale)
    assert merged.tolist() == [[16.0, 32.0], [40.0, 60.0]]
    assert merged_tensor("x.weight", merged, adapter, lora.scale, sign=-1).tolist() == weight.tolist()
    assert merged_tensor("y.weight", weight, adapter, lora.scale) is weight
    with pytest.raises(ValueError, match="replaced x.weight as a whole, so it cannot be taken out"):
        merged_tensor("x.weight", weight, {"x.weight": weight}, 1.0, sign=-1)


def test_dropout_is_on_the_input_of_a_and_in_training_only():
    layer = LoRALinear(torch.nn.Linear(64, 4, bias=False), LoRAConfig(rank=64, alpha=64, dropout=0.5))
    with torch.no_grad():
        layer.lora_A.weight.copy_(torch.eye(64))
        layer.lora_B.weight.fill_(1.0)
    x = torch.ones(1000, 64)
    addition = (layer.train()(x) - torch.nn.functional.linear(x, layer.weight)).detach()
    assert addition.std(0).min() > 1 and addition.mean().item() == pytest.approx(64, abs=1)
    addition = (layer.eval()(x) - torch.nn.functional.linear(x, layer.weight)).detach()
    torch.testing.assert_close(addition, torch.full((1000, 4), 64.0))


def test_loading_values_back_into_an_adapter(tiny_model):
    lora = LoRAConfig(rank=2, modules_to_save=("norm",))
    first, second = tiny_model(), tiny_model()
    second.load_state_dict(first.state_dict())
    adapter = trained(first, lora)
    add_adapter(second, lora)
    load_adapter_state(second, adapter, "x.pth")
    assert torch.equal(first(IDS)[0], second(IDS)[0])
    adapter.pop("norm.weight")
    with pytest.raises(ValueError, match="x.pth does not fit: norm.weight is missing, wanted"):
        load_adapter_state(second, adapter, "x.pth")


def test_the_table_adds_up(tiny_model):
    model = tiny_model(use_moe=True)
    add_adapter(model, LoRAConfig(rank=3, targets=("wk", "experts"), modules_to_save=("gate", "tok_embeddings")))
    *rows, last = trainable_table(model).splitlines()[1:]
    numbers = [[int(text.replace(",", "")) for text in row.split()[-2:]] for row in [*rows, last]]
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert numbers[-1] == [len(parameters), sum(p.numel() for p in parameters)]
    assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == numbers[-1]
    # by hand: embeddings, 2 layers of wk A and B, of 4 experts' 3 matrices, of the router
    size = 48 * 32 + 2 * 3 * (32 + 16) + 2 * 4 * 3 * 3 * (32 + 48) + 2 * 4 * 32
    assert numbers[-1] == [1 + 2 * 2 + 2 * 4 * 3 * 2 + 2, size]
    total = model.num_parameters()
    assert f"{size / total:.2%} of {total:,}" in last
    assert "layers.*.attention.wk.lora_B.weight" in trainable_table(model)


# Files


def test_load_model_merges_adapters_in_order(base):
    path, model = base
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    low_rank = LoRAConfig(rank=2, alpha=6, targets=("wq", "w2"))
    whole = LoRAConfig(rank=2, targets=("wv",), modules_to_save=("wq",))
    first = trained(Transformer(model.config), low_rank, seed=1)
    second = trained(Transformer(model.config), whole, seed=2)
    files = [
        save_adapter(path.with_name("lora_a_32.pth"), first, low_rank, model.config, path),
        save_adapter(path.with_name("lora_b_32.pth"), second, whole, model.config, path),
    ]
    name = "layers.0.attention.wq"
    replaced = second[f"{name}.weight"]
    added = 3 * first[f"{name}.lora_B.weight"] @ first[f"{name}.lora_A.weight"]
    merged, _ = load_model(path, tokenizer=TOKENIZER, adapters=files[::-1])
    torch.testing.assert_close(merged.state_dict()[f"{name}.weight"], replaced + added)
    assert torch.equal(merged.layers[0].attention.wo.weight, plain["layers.0.attention.wo.weight"])
    assert merged.output.weight is merged.tok_embeddings.weight and merged.output.weight.requires_grad
    with pytest.raises(ValueError, match="lora_b_32.pth replaces layers.0.attention.wq.weight as a whole.*lora_a_32"):
        load_model(path, tokenizer=TOKENIZER, adapters=files)  # what the first did would be lost
    both = merged.layers[1].feed_forward.w2.weight
    name = "layers.1.feed_forward.w2"
    added = 3 * first[f"{name}.lora_B.weight"] @ first[f"{name}.lora_A.weight"]
    torch.testing.assert_close(both, plain[f"{name}.weight"] + added)


def test_adapters_are_found_by_name_or_path(base):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq",))
    state = trained(model, lora)
    a, b = (save_adapter(path.with_name(f"lora_{n}_32.pth"), state, lora, model.config, path) for n in "ab")
    assert find_adapters("a,lora_b", path.parent, model.config) == [a, b]
    assert find_adapters(f"{b},a", path.parent, model.config) == [b, a]
    assert find_adapters(None, path.parent, model.config) == []
    with pytest.raises(ValueError, match=r"no adapter 'c': .*lora_c_32.pth.*there are: lora_a_32.pth, lora_b_32.pth"):
        find_adapters("c", path.parent, model.config)
    with pytest.raises(ValueError, match=r"lora_a_512.pth does not exist"):
        find_adapters("a", path.parent, "small")


def test_an_adapter_of_other_weights_is_refused(base, tiny_model):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq",))
    file = save_adapter(path.with_name("lora_a_32.pth"), trained(model, lora), lora, model.config, path)
    other = save_base(path.with_name("other_32.pth"), tiny_model(vocab_size=6400))
    with pytest.raises(ValueError) as error:
        load_model(other, adapters=[file])
    for part in (str(file), path.name, file_sha256(path)[:16], str(other), file_sha256(other)[:16]):
        assert part in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("dim", 64), ("n_layers", 3), ("rope_theta", 500.0), ("n_heads", 2)])
def test_an_adapter_of_another_size_is_refused(base, tiny_model, field, value):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq",))
    other = tiny_model(**({"vocab_size": 6400} | {field: value}))
    file = save_adapter(path.with_name("lora_a_32.pth"), trained(other, lora), lora, other.config, path)
    with pytest.raises(ValueError, match=f"lora_a_32.pth is for a model with {field}={value}, .* has "):
        load_model(path, adapters=[file])


def test_an_adapter_of_another_context_length_is_taken(base, tiny_model):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq",))
    config = LMConfig.from_dict(model.config.to_dict() | {"max_seq_len": 128})
    file = save_adapter(path.with_name("lora_a_32.pth"), trained(model, lora), lora, config, path)
    assert read_adapter(file, path, model.config, TOKENIZER)[1] == lora


def test_an_adapter_of_another_tokenizer_is_refused(base):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq",))
    state = trained(model, lora)
    file = save_adapter(path.with_name("lora_a_32.pth"), state, lora, model.config, path, tokenizer="0" * 64)
    with pytest.raises(ValueError, match=r"lora_a_32.pth was trained with another tokenizer \(000000000000\)"):
        load_model(path, tokenizer=TOKENIZER, adapters=[file])


def test_adapters_with_other_tensors_than_they_should_are_refused(base):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq", "wo"))
    state = trained(model, lora)
    file = path.with_name("lora_a_32.pth")

    def refusal(state: dict) -> str:
        save_adapter(file, state, lora, model.config, path)
        with pytest.raises(ValueError) as error:
            load_model(path, adapters=[file])
        return str(error.value)

    assert "lora_a_32.pth is an empty adapter" in refusal({})
    gone = "layers.1.attention.wq.lora_B.weight"
    text = refusal({name: value for name, value in state.items() if name != gone})
    assert f"{gone} is missing, wanted (32, 2)" in text and "more" not in text
    text = refusal(state | {"layers.0.attention.wv.lora_A.weight": torch.zeros(2, 32)})
    assert "layers.0.attention.wv.lora_A.weight is (2, 32), wanted missing" in text
    text = refusal({name.replace("attention", "self_attn"): value for name, value in state.items()})
    assert "layers.0.attention.wo.lora_A.weight is missing" in text and "and 13 more" in text


def test_weights_and_adapters_are_not_taken_for_each_other(base):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq",))
    other = save_base(path.with_name("pretrain_32.pth"), model)
    file = save_adapter(path.with_name("lora_a_32.pth"), trained(model, lora), lora, model.config, path)
    with pytest.raises(ValueError, match=r"lora_a_32.pth is an adapter; give it as --lora"):
        read_base(file)
    with pytest.raises(ValueError, match=r"pretrain_32.pth is no adapter"):
        load_model(path, adapters=[other])
    file.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"no adapter: there is no lora_a_32.json"):
        load_model(path, adapters=[file])


def test_a_changed_adapter_is_refused(base):
    path, model = base
    lora = LoRAConfig(rank=2, targets=("wq",))
    file = save_adapter(path.with_name("lora_a_32.pth"), trained(model, lora), lora, model.config, path)
    state = torch.load(file, weights_only=True)
    state["layers.0.attention.wq.lora_A.weight"] += 1
    torch.save(state, file)
    with pytest.raises(ValueError, match="sha256 differs"):
        load_model(path, adapters=[file])


# The stage


def train_adapter(data_dir, base, out, *more: str) -> int:
    arguments = flags(data_dir, out, "--init_from", str(base), "--batch_size", "4", *more, data="sft_data")
    general = ["--replay_path", str(data_dir / "sft_data.csv"), "--general_path", str(data_dir / "sft_val.csv")]
    return stage("4-lora_sft")([*arguments, *general])


def test_the_stage_writes_an_adapter_and_leaves_the_weights_alone(data_dir, sft_weights, tmp_path):
    before = sft_weights.read_bytes()
    more = ["--lora_name", "x", "--epochs", "2", "--modules_to_save", "output,norm", "--rank", "4"]
    assert train_adapter(data_dir, sft_weights, tmp_path, *more) == 0
    assert sft_weights.read_bytes() == before
    state = torch.load(tmp_path / "lora_x_32.pth", weights_only=True)
    assert {"tok_embeddings.weight", "norm.weight"} == {name for name in state if "lora" not in name}
    assert all(state[name].abs().max() > 0 for name in state if "lora_B" in name)
    meta = json.loads((tmp_path / "lora_x_32.json").read_text())
    assert meta["lora"]["rank"] == 4 and meta["base"]["sha256"] == file_sha256(sft_weights)
    rows, general = log_rows(tmp_path, "lora_x_32"), log_rows(tmp_path, "lora_x_32", "general")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert [row["step"] for row in general] == [0, rows[-1]["step"]]
    assert meta["general"] == {"loss": general[1]["loss"], "loss_before": general[0]["loss"]}
    model, _ = load_model(sft_weights, tokenizer=TOKENIZER, adapters=[tmp_path / "lora_x_32.pth"])
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_resume_of_an_adapter_is_bit_identical_and_checks_its_base(data_dir, sft_weights, tmp_path):
    steps = ["--max_steps", "12", "--save_interval", "1", "--dropout", "0.1"]
    assert train_adapter(data_dir, sft_weights, tmp_path / "whole", *steps) == 0
    stop_after(5, lambda: train_adapter(data_dir, sft_weights, tmp_path / "half", *steps))
    with pytest.raises(ValueError, match="adapter's rank was 8, now it is 4"):
        train_adapter(data_dir, sft_weights, tmp_path / "half", *steps, "--rank", "4", "--resume")
    other = tmp_path / "other.pth"
    state = torch.load(sft_weights, weights_only=True)
    state["norm.weight"] = state["norm.weight"] * 1.01
    torch.save(state, other)
    (tmp_path / "other.json").write_text(
        json.dumps(json.loads(sft_weights.with_suffix(".json").read_text()) | {"sha256": file_sha256(other)})
    )
    with pytest.raises(ValueError, match="base weights was"):
        train_adapter(data_dir, other, tmp_path / "half", *steps, "--resume")
    assert train_adapter(data_dir, sft_weights, tmp_path / "half", *steps, "--resume") == 0
    whole, half = (torch.load(tmp_path / out / "lora_identity_32.pth", weights_only=True) for out in ("whole", "half"))
    assert_same(whole, half)


def test_replay_keeps_what_was_taught(data_dir, sft_weights, tmp_path):
    """Learning one answer by heart costs the general loss; with most rows replayed it costs less."""
    one = tmp_path / "one_data.csv"
    one.write_text("history,q,a\n" + "[],春夏秋冬？,花花花花花花花花。\n" * 40, encoding="utf-8")
    after = []
    for share in ("0", "0.8"):
        more = ["--data_path", str(one), "--val_path", "", "--epochs", "8", "--learning_rate", "1e-2"]
        assert train_adapter(data_dir, sft_weights, tmp_path / share, *more, "--replay_share", share) == 0
        after.append(log_rows(tmp_path / share, "lora_identity_32", "general")[-1]["loss"])
    assert after[1] < 0.8 * after[0]
