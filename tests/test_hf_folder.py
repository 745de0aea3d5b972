"""load_folder in model/hf.py: Hugging Face folders back into our weights, bit for bit, or refused with the reason."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import TOKENIZER
from test_merge import IDS, assert_close, assert_same_tensors, hf_logits, hf_model

from model.hf import load_folder, save_folder
from model.model import Transformer
from model.tokenizer import load_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """folder(**overrides): a folder that save_folder wrote, and its model."""

    def make(**overrides):
        model = tiny_model(**({"vocab_size": 6400} | overrides))
        save_folder(tmp_path, model.state_dict(), model.config, TOKENIZER)
        return tmp_path, model

    return make


def change(path, **values) -> None:
    """Changes config.json; a value ... leaves the setting out."""
    found = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


def change_tensors(path, **tensors) -> None:
    """Changes model.safetensors; a value None leaves the tensor out."""
    found = load_file(path / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: value for name, value in found.items() if value is not None}, path / "model.safetensors")


def our_logits(path) -> torch.Tensor:
    state, config, _ = load_folder(path)
    model = Transformer(config).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(IDS)[0]


ODD = dict(dim=36, n_heads=9, n_kv_heads=3, hidden_dim=45, rope_theta=500.0, norm_eps=1e-2, max_seq_len=100)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(),
        ODD,
        dict(n_kv_heads=1, dim=24, hidden_dim=None, multiple_of=7),
        dict(use_moe=True),
        dict(use_moe=True, n_shared_experts=2, num_experts_per_tok=3, n_routed_experts=5, norm_topk_prob=False),
        dict(use_moe=True, n_shared_experts=0, aux_loss_alpha=0.1) | ODD,
    ],
    ids=lambda overrides: ",".join(f"{name}={value}" for name, value in overrides.items()) or "plain",
)
def test_what_was_saved_comes_back(folder, overrides):
    path, model = folder(**overrides)
    state, config, tokenizer_dir = load_folder(str(path))
    assert_same_tensors(state, model.state_dict())
    assert list(state) == list(model.state_dict()) and {value.dtype for value in state.values()} == {torch.float32}
    assert state["output.weight"] is state["tok_embeddings.weight"]
    expected = model.config.to_dict() | {"hidden_dim": model.config.ffn_dim, "multiple_of": 64}
    assert config.to_dict() == expected
    assert load_tokenizer(tokenizer_dir).fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_what_transformers_saved_again_comes_back(folder, tmp_path, use_moe):
    path, model = folder(use_moe=use_moe, rope_theta=500.0)
    hf_model(path).save_pretrained(tmp_path / "again", max_shard_size="200KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1, "an index of several files"
    state, config, _ = load_folder(tmp_path / "again")
    assert_same_tensors(state, model.state_dict())
    assert config.to_dict() == model.config.to_dict()


def test_a_folder_from_elsewhere(folder):
    """bfloat16, the output apart but equal, names of old files, settings left out that have the usual values."""
    path, _ = folder(n_kv_heads=4)
    low = {name: value.bfloat16() for name, value in load_file(path / "model.safetensors").items()}
    low["lm_head.weight"] = low["model.embed_tokens.weight"].clone()
    low["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(low, path / "model.safetensors")
    left_out = ["head_dim", "attention_bias", "mlp_bias", "num_key_value_heads", "rope_theta", "rms_norm_eps"]
    change(path, tie_word_embeddings=False, dtype="bfloat16", **dict.fromkeys(left_out, ...))
    state, config, _ = load_folder(path)
    assert config.norm_eps == 1e-6 and {value.dtype for value in state.values()} == {torch.float32}
    change(path, dtype="float32", torch_dtype="float32")
    assert_close(our_logits(path), hf_logits(path))


@pytest.mark.parametrize(
    "values",
    [
        dict(model_type="mistral"),
        dict(model_type=...),
        dict(rope_scaling={"type": "linear", "factor": 2.0}),
        dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        dict(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0}),
        dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        dict(partial_rotary_factor=0.5),
        dict(rope_scaling="linear"),
        dict(attention_bias=True),
        dict(mlp_bias=True),
        dict(hidden_act="gelu"),
        dict(sliding_window=4096),
        dict(head_dim=16),
        dict(quantization_config={"bits": 4}),
        dict(hidden_size=...),
        dict(num_hidden_layers="2"),
        dict(num_attention_heads=0),
        dict(vocab_size=True),
        dict(rms_norm_eps="1e-5"),
        dict(rope_theta=[1]),
    ],
    ids=str,
)
def test_settings_that_ours_does_not_have(folder, values):
    path, _ = folder()
    change(path, **values)
    name = next(iter(values))
    with pytest.raises(
        ValueError, match=r"config.json has (type|rope_type|partial_rotary_factor|" + name + ")"
    ) as error:
        load_folder(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        dict(use_sliding_window=True),
        dict(decoder_sparse_step=2),
        dict(mlp_only_layers=[0]),
        dict(shared_expert_intermediate_size=50),
        dict(num_experts=...),
        dict(num_experts_per_tok=9),
    ],
    ids=str,
)
def test_settings_of_a_mixture_that_ours_does_not_have(folder, values):
    path, _ = folder(use_moe=True)
    change(path, sliding_window=4096)  # not used
    load_folder(path)
    change(path, **values)
    with pytest.raises(ValueError, match=rf"config.json.* {next(iter(values))}"):
        load_folder(path)


def test_tensors_that_ours_does_not_have(folder):
    path, model = folder(use_moe=True)
    good = (path / "model.safetensors").read_bytes()
    for tensors, message in (
        ({"model__norm__weight": None}, "model.norm.weight is missing, .* it is \\(32,\\)"),
        ({"model__norm__weight": torch.ones(31)}, "model.norm.weight is \\(31,\\)"),
        ({"model__embed_tokens__weight": None}, "model.embed_tokens.weight is missing"),
        ({"model__layers__0__self_attn__o_proj__bias": torch.zeros(32)}, "o_proj.bias is \\(32,\\), .* not there"),
        ({"model__layers__1__self_attn__q_proj__bias": torch.ones(32)}, "q_proj.bias is not all zeros"),
        ({"model__layers__0__mlp__shared_expert_gate__weight": torch.ones(1, 32)}, "gate.weight is not all zeros"),
        ({"lm_head__weight": torch.ones(6400, 32)}, "lm_head.weight is not embed_tokens.weight"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, "norm.weight is of type int8"),
    ):
        (path / "model.safetensors").write_bytes(good)
        change_tensors(path, **tensors)
        with pytest.raises(ValueError, match=message):
            load_folder(path)
    (path / "model.safetensors").write_bytes(good)
    change(path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lm_head.weight is missing, and tie_word_embeddings"):
        load_folder(path)


def test_files_that_are_not_there_or_damaged(folder, tmp_path):
    with pytest.raises(ValueError, match="nothing/config.json does not exist"):
        load_folder(tmp_path / "nothing")
    path, _ = folder()
    weights = path / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:1000])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_folder(path)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors does not exist; save"):
        load_folder(path)
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch boo'\ntR.")
    with pytest.raises(ValueError, match="does not exist; .bin files are not read"):
        load_folder(path)
    index = path / "model.safetensors.index.json"
    for weight_map, message in (
        ({"model.norm.weight": "../model.safetensors"}, "index.json is damaged"),
        ({}, "index.json is damaged"),
        ([], "index.json is damaged"),
        ({"model.norm.weight": "a.safetensors"}, "a.safetensors does not exist, though"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load_folder(path)
    for text in ("{", "[]", "[" * 100_000):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is damaged"):
            load_folder(path)
