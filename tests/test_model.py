"""The model against its sources: v1's own logits, transformers' Llama and Qwen2-MoE, and the equations in loops."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.model as model_module
from model.LMConfig import SIZES, LMConfig
from model.model import BlockAttention, FeedForward, KVCache, MoE, RMSNorm, Transformer, document_starts


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 48, shape)


@pytest.fixture(params=["blocks", "sdpa", "written_out"])
def path(request, monkeypatch) -> dict:
    """Config overrides for each way to compute attention: on CPUs, on other devices, and as the equation says."""
    if request.param == "sdpa":
        monkeypatch.setattr(model_module, "use_block_attention", lambda device: False)
    return dict(flash_attn=request.param != "written_out")


# ---------------------------------------------------------------- sizes and the layout of v1's files


def v1_shapes(dim: int, n_layers: int, kv: int, hidden: int, moe: bool) -> dict[str, tuple[int, ...]]:
    """Every key of a v1 checkpoint, as listed in v1's compatibility contract."""
    shapes = {"tok_embeddings.weight": (6400, dim), "norm.weight": (dim,), "output.weight": (6400, dim)}
    for i in range(n_layers):
        layer = f"layers.{i}."
        shapes |= {layer + f"{name}_norm.weight": (dim,) for name in ("attention", "ffn")}
        for name, rows in dict(wq=dim, wk=kv, wv=kv, wo=dim).items():
            shapes[layer + f"attention.{name}.weight"] = (rows, dim)
        networks = ["feed_forward."]
        if moe:
            shapes[layer + "feed_forward.gate.weight"] = (4, dim)
            experts = [f"experts.{e}" for e in range(4)] + ["shared_experts"]
            networks = [f"feed_forward.{name}." for name in experts]
        for network in networks:
            shapes |= {layer + network + f"{name}.weight": (hidden, dim) for name in ("w1", "w3")}
            shapes[layer + network + "w2.weight"] = (dim, hidden)
    return shapes


@pytest.mark.parametrize(
    ("size", "num_keys", "total", "active", "numbers"),
    [
        ("small", 75, 26_878_464, 26_878_464, (512, 8, 256, 1408, False)),
        ("base", 147, 108_749_568, 108_749_568, (768, 16, 384, 2048, False)),
        ("moe", 179, 96_100_864, 61_497_856, (512, 8, 256, 1408, True)),
    ],
)
def test_sizes_and_keys_are_v1s(size, num_keys, total, active, numbers):
    with torch.device("meta"):
        model = Transformer(LMConfig.from_size(size))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == num_keys
    assert shapes == v1_shapes(*numbers)
    assert (model.num_parameters(), model.num_parameters(active=True)) == (total, active)


def test_tiny_is_small_enough_for_a_laptop():
    config = LMConfig.from_size("tiny")
    with torch.device("meta"):
        assert Transformer(config).num_parameters() == 6_065_408


def test_embedding_and_output_stay_one_tensor(tiny_model):
    model = tiny_model()
    weights = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    model.load_state_dict(weights)
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        assert each.output.weight is each.tok_embeddings.weight
    assert torch.equal(model.output.weight, weights["output.weight"])


def test_initial_weights():
    config = LMConfig(dim=256, n_layers=3, n_heads=8, n_kv_heads=4, use_moe=True)
    for name, weight in Transformer(config).named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        residual = name.endswith(("wo.weight", "w2.weight"))
        std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
        assert weight.std().item() == pytest.approx(std, rel=0.08), name
        assert weight.mean().abs().item() < 5 * std / math.sqrt(weight.numel()), name


def test_first_loss_is_that_of_a_guess():
    ids = torch.randint(0, 6400, (2, 64))
    logits, aux = Transformer(LMConfig.from_size("tiny"))(ids)
    assert F.cross_entropy(logits.flatten(0, 1), ids.flatten().roll(1)).item() == pytest.approx(math.log(6400), abs=0.1)
    assert (aux.shape, aux.dtype, aux.item()) == ((), torch.float32, 0)


# ---------------------------------------------------------------- parity with v1 and with transformers


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_logits_and_losses_are_v1s(shared_data, name, path):
    folder = shared_data / "golden_v1" / name
    model = Transformer(LMConfig(**json.loads((folder / "config.json").read_text()), **path)).eval()
    model.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
    expected = {key: torch.from_numpy(value) for key, value in np.load(folder / "expected.npz").items()}
    logits, _ = model(expected["tokens"])
    assert_near(logits, expected["logits"], 1e-4)
    loss = F.cross_entropy(logits.flatten(0, 1), expected["tokens"].flatten(), ignore_index=0, reduction="none")
    assert_near(loss, expected["loss_per_token"], 1e-4)


def interleaved_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk from v1's order of channels (pairs of neighbours) to transformers' (pairs half a head apart)."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def llama_names(weights: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Weights, or their gradients, under transformers' names; of the feed-forward part only a dense one's."""
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    names |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    names |= {f"feed_forward.w{i}": f"mlp.{x}_proj" for i, x in zip("123", ("gate", "down", "up"), strict=True)}
    mapped = {}
    for key, value in weights.items():
        prefix, name = "", key.removesuffix(".weight")
        if key.startswith("layers."):
            _, index, name = name.split(".", 2)
            prefix = f"model.layers.{index}."
        if name in ("attention.wq", "attention.wk"):
            value = interleaved_to_halves(value, config.n_heads if name[-1] == "q" else config.n_kv_heads)
        if name in names:
            mapped[f"{prefix}{names[name]}.weight"] = value
    return mapped


def reference_numbers(config: LMConfig) -> dict:
    """The arguments that transformers' configurations of Llama and Qwen2-MoE share."""
    return dict(
        hidden_size=config.dim, intermediate_size=config.ffn_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta, max_position_embeddings=4096,
        tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip


def make_llama(model: Transformer):
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**reference_numbers(model.config))).eval()
    reference.load_state_dict(llama_names(model.state_dict(), model.config))
    return reference


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_logits_are_llamas(tiny_model, path, n_kv_heads):
    model = tiny_model(n_kv_heads=n_kv_heads, rope_theta=5000.0, norm_eps=1e-3, **path)
    ids = random_ids(2, 150)  # longer than max_seq_len, which is 64
    assert_near(model(ids)[0], make_llama(model)(ids).logits, 1e-5)


def test_gradients_are_llamas(tiny_model, path):
    model = tiny_model(**path)
    reference = make_llama(model)
    ids, labels = random_ids(2, 100), random_ids(200)
    for logits in (model(ids)[0], reference(ids).logits):
        F.cross_entropy(logits.flatten(0, 1), labels).backward()
    got = llama_names({name: p.grad for name, p in model.named_parameters()}, model.config)
    for name, parameter in reference.named_parameters():
        assert_near(got[name], parameter.grad, 1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_llamas(tiny_model, path, side):
    model = tiny_model(**path)
    lengths, ids = [70, 1, 33], random_ids(3, 70)
    real = torch.stack([torch.arange(70) < n for n in lengths])
    real = real.flip(1) if side == "left" else real
    want = make_llama(model)(ids, attention_mask=real.long()).logits
    for mask in (real, real.long()):  # a tokenizer gives integers
        assert_near(model(ids, attention_mask=mask)[0][real], want[real], 1e-5)
    for row in range(3):
        alone = model(ids[row][real[row]][None])[0][0]
        assert_near(model(ids, attention_mask=real)[0][row][real[row]], alone, 1e-5)


@pytest.mark.parametrize(("experts_per_token", "n_shared_experts"), [(2, 1), (3, 2)])
def test_moe_logits_are_qwen2_moes(tiny_model, experts_per_token, n_shared_experts):
    """Exact when the gate of the shared expert is zero (a sigmoid of 0.5) and its last projection doubled."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(use_moe=True, num_experts_per_tok=experts_per_token, n_shared_experts=n_shared_experts)
    config = model.config
    reference = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **reference_numbers(config),
            moe_intermediate_size=config.ffn_dim,
            shared_expert_intermediate_size=config.ffn_dim * n_shared_experts,
            num_experts=config.n_routed_experts,
            num_experts_per_tok=experts_per_token,
            norm_topk_prob=True,
        )
    ).eval()
    weights = {name: torch.zeros_like(value) for name, value in reference.state_dict().items()}  # biases stay 0
    weights |= llama_names(model.state_dict(), config)
    for i, layer in enumerate(model.layers):
        moe, mlp = layer.feed_forward, f"model.layers.{i}.mlp."
        shared = moe.shared_experts
        weights[mlp + "gate.weight"] = moe.gate.weight
        weights[mlp + "experts.gate_up_proj"] = torch.stack(
            [torch.cat((expert.w1.weight, expert.w3.weight)) for expert in moe.experts]
        )
        weights[mlp + "experts.down_proj"] = torch.stack([expert.w2.weight for expert in moe.experts])
        weights[mlp + "shared_expert.gate_proj.weight"] = shared.w1.weight
        weights[mlp + "shared_expert.up_proj.weight"] = shared.w3.weight
        weights[mlp + "shared_expert.down_proj.weight"] = 2 * shared.w2.weight
    reference.load_state_dict(weights)
    ids = random_ids(2, 80)
    assert_near(model(ids)[0], reference(ids).logits, 1e-5)


# ---------------------------------------------------------------- attention


def plain_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V in the precision of its arguments, every head with a copy of its keys."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = torch.ones(length, length).tril().bool()[None]
    if starts is not None:
        seen = seen & (torch.arange(length) >= starts[:, :, None])
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return scores.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ v


def attention_inputs(length: int, heads: int, kv_heads: int, head_dim: int = 8) -> list[Tensor]:
    """Queries, keys and values with gradients, laid out in memory as the model makes them (B, T, heads, C)."""
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]


def with_gradients(attention, inputs: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of q, k and v, computed in dtype and returned in float64."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = attention(*inputs)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype)))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_block_attention_is_attention(length, heads, kv_heads, packed):
    inputs, grad = attention_inputs(length, heads, kv_heads), torch.randn(2, heads, length, 8)
    starts = None
    if packed:  # documents of about 30 tokens in one row, of about 100 in the other
        starts = document_starts((torch.rand(2, length) < torch.tensor([[1 / 30], [1 / 100]])).cumsum(1))
    want = with_gradients(lambda *x: plain_attention(*x, starts), inputs, grad, torch.float64)
    got = with_gradients(lambda *x: BlockAttention.apply(*x, starts), inputs, grad, torch.float32)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 1e-5)


def test_block_attention_gradcheck(monkeypatch):
    monkeypatch.setattr(model_module, "QUERY_BLOCK", 3)
    inputs = [torch.randn(1, n, 7, 4, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    for starts in (None, torch.tensor([[0, 0, 2, 2, 2, 2, 6]])):
        assert torch.autograd.gradcheck(lambda *x, s=starts: BlockAttention.apply(*x, s), inputs)


def test_block_attention_has_no_second_derivative():
    """It would be wrong without a word: the backward pass is not written to be differentiated."""
    inputs = attention_inputs(5, 2, 1)
    grads = torch.autograd.grad(BlockAttention.apply(*inputs, None).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


def test_block_attention_in_bfloat16_is_as_exact_as_torchs():
    inputs, grad = attention_inputs(200, 4, 2, head_dim=32), torch.randn(2, 4, 200, 32)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    rounded = [x.bfloat16() for x in inputs]
    want = with_gradients(plain_attention, rounded, grad.bfloat16(), torch.float64)
    ours = with_gradients(lambda *x: BlockAttention.apply(*x, None), rounded, grad, torch.bfloat16)
    theirs = with_gradients(torchs, rounded, grad, torch.bfloat16)
    for a, b, c in zip(ours, theirs, want, strict=True):
        assert (a - c).norm() < 2.5 * (b - c).norm() < 0.02 * c.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_fused_attention_is_attention(packed):
    """Also with document borders and no mask: so it is called where a block is compiled and the model is not."""
    q, k, v = attention_inputs(50, 4, 2)
    starts = document_starts((torch.arange(50) > torch.tensor([[20], [35]])).int()) if packed else None
    got = model_module.fused_attention(q, k, v, starts, None)
    assert_near(got, plain_attention(q, k, v, starts), 1e-6)


def test_document_starts():
    documents = torch.tensor([[1, 1, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5]])
    assert document_starts(documents).tolist() == [[0, 0, 2, 3, 3, 5, 5], [0] * 7]


@pytest.mark.parametrize("moe", [False, True])
def test_packed_documents_do_not_see_each_other(tiny_model, path, moe):
    model = tiny_model(use_moe=moe, **path)
    rows = [[40, 1, 70, 30], [100, 3, 25]]  # lengths; the rows have 141 tokens and padding
    ids, documents = random_ids(2, 141), torch.zeros(2, 141, dtype=torch.int32)
    pieces = []
    for row, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths, 1):
            documents[row, begin : begin + length] = number
            pieces.append((row, begin, begin + length))
            begin += length
    logits, aux = model(ids, documents=documents)
    for row, begin, end in pieces:
        assert_near(logits[row, begin:end], model(ids[row : row + 1, begin:end])[0][0], 1e-5)

    padding = documents == 0
    other, other_aux = model(torch.where(padding, 7, ids), documents=documents)
    assert_near(other[~padding], logits[~padding], 1e-6)
    assert torch.equal(other_aux, aux) and (aux > 0) == moe


def test_documents_are_for_whole_rows(tiny_model):
    model, ids = tiny_model(), random_ids(1, 4)
    for more in (dict(cache=KVCache(model.config, 1, 8)), dict(attention_mask=torch.ones(1, 4).bool())):
        with pytest.raises(ValueError, match="documents"):
            model(ids, documents=torch.ones(1, 4).int(), **more)


def test_only_differences_of_positions_matter(tiny_model):
    model, ids = tiny_model(), random_ids(2, 50)
    logits, _ = model(ids)
    assert_near(model(ids, positions=torch.arange(1000, 1050)[None])[0], logits, 1e-4)
    assert (model(ids, positions=2 * torch.arange(50)[None])[0] - logits).abs().max() > 0.05


@pytest.mark.parametrize("moe", [False, True])
def test_select_is_indexing(tiny_model, moe):
    model, ids = tiny_model(use_moe=moe), random_ids(3, 20)
    select = torch.rand(3, 20) < 0.3
    logits, aux = model(ids)
    chosen, same_aux = model(ids, select=select)
    assert_near(chosen, logits[select], 1e-6)
    assert torch.equal(aux, same_aux)
    assert model(ids, select=torch.zeros_like(select))[0].shape == (0, 48)


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 90, [5, 1, 70, 2, 12], [90]], ids=["tokens", "chunks", "whole"])
@torch.no_grad()
def test_cached_logits_are_uncached_ones(tiny_model, path, moe, chunks):
    model, ids = tiny_model(use_moe=moe, **path), random_ids(2, 90)  # max_seq_len is 64
    cache = KVCache(model.config, 2, 90)
    got = torch.cat([model(chunk, cache=cache)[0] for chunk in ids.split(chunks, 1)], 1)
    want = model(ids)[0]
    assert_near(got, want, 5e-6 * want.abs().max().item())  # about 40 float32 roundings of the largest logit
    assert cache.length == 90
    with pytest.raises(ValueError, match="90"):
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_cached_batch_of_unequal_prompts(tiny_model, path, side, chunks):
    """Each row answers as it would alone, whether or not later calls repeat the mask."""
    model = tiny_model(**path)
    prompts = [random_ids(n) for n in (12, 4, 9)]
    answer = random_ids(3, 6)
    ids, real = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(12 - len(prompt), 12) if side == "left" else slice(0, len(prompt))
        ids[row, place], real[row, place] = prompt, True
    whole = torch.cat((real, torch.ones(3, 6, dtype=torch.bool)), 1)
    for repeat_mask in (False, True):
        cache, got, end = KVCache(model.config, 3, 18), [], 0
        for chunk in ids.split(chunks, 1):
            end += chunk.shape[1]
            model(chunk, cache=cache, attention_mask=real[:, :end])
        for token in answer.split([1, 1, 4], 1):
            end += token.shape[1]
            got.append(model(token, cache=cache, attention_mask=whole[:, :end] if repeat_mask else None)[0])
        for row, prompt in enumerate(prompts):
            want = model(torch.cat((prompt, answer[row]))[None])[0][0, len(prompt) :]
            assert_near(torch.cat(got, 1)[row], want, 1e-5)


@torch.no_grad()
def test_cache_truncate_forgets(tiny_model):
    model, ids, other = tiny_model(), random_ids(2, 20), random_ids(2, 10)
    cache = KVCache(model.config, 2, 22)
    model(ids, cache=cache)
    cache.truncate(12)
    want = model(torch.cat((ids[:, :12], other), 1))[0][:, 12:]
    assert_near(model(other, cache=cache)[0], want, 1e-5)
    cache.truncate(30)
    assert cache.length == 22


@torch.no_grad()
def test_cache_truncate_forgets_padding(tiny_model):
    model, ids, other = tiny_model(), random_ids(2, 8), random_ids(2, 3)
    cache = KVCache(model.config, 2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 4:] = False
    model(ids, cache=cache, attention_mask=mask)
    cache.truncate(4)
    want = model(torch.cat((ids[:, :4], other), 1))[0][:, 4:]
    assert_near(model(other, cache=cache)[0], want, 1e-5)


@torch.no_grad()
def test_cache_select_keeps_rows(tiny_model):
    model, ids, token = tiny_model(), random_ids(3, 10), random_ids(3, 1)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[2, :6] = False
    rows = torch.tensor([2, 0, 2])
    cache = KVCache(model.config, 3, 12)
    model(ids, cache=cache, attention_mask=mask)
    cache.select(rows)
    want = model(torch.cat((ids[rows], token), 1), attention_mask=torch.cat((mask[rows], torch.ones(3, 1).bool()), 1))[
        0
    ][:, -1:]
    assert_near(model(token, cache=cache)[0], want, 1e-5)


@torch.no_grad()
def test_caches_are_independent(tiny_model):
    """v1 kept the cache on the layers: two conversations mixed, and the next prompt saw the one before."""
    model, a, b = tiny_model(), random_ids(1, 9), random_ids(2, 9)
    caches = KVCache(model.config, 1, 9), KVCache(model.config, 2, 9)
    got = [(model(a[:, i : i + 1], cache=caches[0])[0], model(b[:, i : i + 1], cache=caches[1])[0]) for i in range(9)]
    for ids, logits in zip((a, b), zip(*got, strict=True), strict=True):
        assert_near(torch.cat(logits, 1), model(ids)[0], 1e-5)


@torch.no_grad()
def test_bfloat16_cache_under_a_float32_model(tiny_model, path):
    model, ids = tiny_model(**path), random_ids(2, 30)
    cache = KVCache(model.config, 2, 30, dtype=torch.bfloat16)
    got = torch.cat([model(chunk, cache=cache)[0] for chunk in ids.split([20, 1, 9], 1)], 1)
    want = model(ids)[0]
    assert cache.k.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert (got - want).norm() < 0.02 * want.norm()


# ---------------------------------------------------------------- mixture of experts


def moe_layer(config: LMConfig) -> MoE:
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


def moe_loop(layer: MoE, x: Tensor) -> Tensor:
    """The definition, a token at a time: sum_k w_k E_k(x) + shared(x); v1 does not renormalise a single expert."""
    config, rows = layer.config, []
    for token in x.flatten(0, 1):
        scores = (layer.gate.weight @ token).softmax(-1)
        best = scores.argsort(descending=True)[: config.num_experts_per_tok]
        weights = scores[best]
        if config.norm_topk_prob and len(best) > 1:
            weights = weights / weights.sum()
        row = sum(w * layer.experts[e](token) for w, e in zip(weights, best.tolist(), strict=True))
        rows.append(row + layer.shared_experts(token) if config.n_shared_experts else row)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("n_shared_experts", [0, 1, 2])
@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_moe_is_the_plain_loop(tiny_config, experts_per_token, n_shared_experts, norm_topk_prob):
    layer = moe_layer(
        tiny_config(
            use_moe=True,
            num_experts_per_tok=experts_per_token,
            n_shared_experts=n_shared_experts,
            norm_topk_prob=norm_topk_prob,
        )
    )
    width = sum(p.numel() for name, p in layer.named_parameters() if "shared" in name)
    assert width == 3 * 32 * 48 * n_shared_experts
    x, grad = torch.randn(2, 11, 32, requires_grad=True), torch.randn(2, 11, 32)
    got, want = layer(x, None)[0], moe_loop(layer, x)
    assert_near(got, want, 1e-5)
    everything = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, everything, grad), torch.autograd.grad(want, everything, grad), strict=True
    ):
        assert_near(a, b, 5e-5)


def test_moe_drops_no_token(tiny_config):
    """All tokens want the same experts: those take all of them, and the idle ones still have a gradient (zero)."""
    for k, wanted in ((1, {1}), (2, {1, 3})):
        layer = moe_layer(tiny_config(use_moe=True, num_experts_per_tok=k))
        with torch.no_grad():
            layer.gate.weight[:, 0] = torch.tensor([-9.0, 12.0, -9.0, 9.0])
        x = torch.randn(3, 40, 32)
        x[..., 0] = 10.0
        out, _ = layer(x, None)
        assert_near(out, moe_loop(layer, x), 2e-3)
        assert layer.load.tolist() == [1 / k if e in wanted else 0 for e in range(4)]
        out.sum().backward()
        for number, expert in enumerate(layer.experts):
            assert all(bool(p.grad.any()) == (number in wanted) for p in expert.parameters())


def test_moe_with_a_single_token(tiny_model):
    model, ids = tiny_model(use_moe=True), random_ids(1, 6)
    assert_near(model(ids[:, :1])[0], model(ids)[0][:, :1], 1e-5)


@pytest.mark.parametrize("moe", [False, True])
def test_training_computes_what_inference_does(tiny_model, moe):
    """Gradients too: v1 had none through its experts in eval mode."""
    model, ids = tiny_model(use_moe=moe), random_ids(2, 30)
    results = []
    for mode in (True, False):
        logits, aux = model.train(mode)(ids)
        gradients = torch.autograd.grad(logits.logsumexp(-1).sum() + aux, list(model.parameters()))
        results.append((logits, aux, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_routing_is_float32_in_any_precision(tiny_config, how):
    """Experts that differ by less than bfloat16 resolves still get the tokens that float32 gives them."""
    layer, x = moe_layer(tiny_config(use_moe=True)), torch.randn(2, 64, 32)
    with torch.no_grad():
        layer.gate.weight[1:] = layer.gate.weight[0]
        layer.gate.weight[torch.arange(4), torch.arange(4)] *= 1 + 2**-6
        if how == "weights":
            layer, x = layer.bfloat16(), x.bfloat16()
    want = copy.deepcopy(layer).float()(x.float(), None)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(layer(x, None)[1], want)


def v1_balance_loss(probs: Tensor, chosen: Tensor, alpha: float, seq_aux: bool) -> float:
    """v1's MoEGate, in loops, of sequences without padding. probs (B, T, E), chosen (B, T, k)."""
    sequences = list(zip(probs, chosen, strict=True))
    if not seq_aux:
        sequences = [(probs.flatten(0, 1), chosen.flatten(0, 1))]
    total = 0.0
    for p, c in sequences:
        for e in range(p.shape[1]):
            share = sum(int(e in picks) for picks in c.tolist()) / (c.shape[0] * c.shape[1] / p.shape[1])
            total += alpha * share * sum(p[:, e].tolist()) / len(p) / len(sequences)
    return total


@pytest.mark.parametrize("seq_aux", [True, False])
def test_balance_loss_is_v1s(tiny_config, seq_aux):
    layer = moe_layer(tiny_config(use_moe=True, seq_aux=seq_aux, aux_loss_alpha=0.1))
    x = torch.randn(3, 16, 32)
    probs = F.linear(x, layer.gate.weight).softmax(-1)
    chosen = probs.topk(2).indices
    assert layer(x, None)[1].item() == pytest.approx(v1_balance_loss(probs, chosen, 0.1, seq_aux), rel=1e-5)
    share = [(chosen == e).float().mean().item() for e in range(4)]
    assert layer.load.tolist() == pytest.approx(share)


def test_balance_loss_ignores_padding(tiny_config):
    x = torch.randn(2, 16, 32)
    real = torch.stack((torch.arange(16) < 10, torch.arange(16) < 10))
    for seq_aux in (True, False):
        layer = moe_layer(tiny_config(use_moe=True, seq_aux=seq_aux))
        want = layer(x[:, :10], None)[1]
        load = layer.load
        assert_near(layer(x, real)[1], want, 1e-7)
        assert_near(layer.load, load, 1e-7)
        assert layer(x, torch.zeros(2, 16, dtype=torch.bool))[1] == 0  # not 0 / 0


@pytest.mark.parametrize("how", ["documents", "attention_mask"])
def test_padding_reaches_the_balance_loss(tiny_model, how):
    model, ids = tiny_model(use_moe=True), random_ids(2, 20)
    real = (torch.arange(20) < 12).expand(2, 20)
    aux = model(ids, **{how: real.int() if how == "documents" else real})[1]
    short = model(ids[:, :12])[1]
    assert_near(aux, short, 1e-6)
    parts = [layer.feed_forward.load for layer in model.layers]
    assert model.expert_load() == pytest.approx(torch.stack(parts).mean(0).tolist())
    assert sum(model.expert_load()) == pytest.approx(1)


def test_balance_loss_is_the_sum_over_layers_in_float32(tiny_model):
    model, ids = tiny_model(use_moe=True), random_ids(2, 20)
    parts = []
    for layer in model.layers:
        layer.feed_forward.register_forward_hook(lambda module, args, out: parts.append(out[1]))
    aux = model(ids)[1]
    assert len(parts) == 2
    assert_near(aux, sum(parts), 1e-7)
    assert (aux.shape, aux.dtype) == ((), torch.float32)
    assert model.bfloat16()(ids)[1].dtype == torch.float32


def test_expert_load_of_a_dense_model_is_none(tiny_model):
    model = tiny_model()
    model(random_ids(1, 4))
    assert model.expert_load() is None


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("which", ["logits", "aux"])
def test_gradient_reaches_the_router(tiny_model, experts_per_token, which):
    model, ids = tiny_model(use_moe=True, num_experts_per_tok=experts_per_token), random_ids(2, 20)
    logits, aux = model(ids)
    (F.cross_entropy(logits.flatten(0, 1), ids.flatten()) if which == "logits" else aux).backward()
    for layer in model.layers:
        assert layer.feed_forward.gate.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("seq_aux", [True, False])
def test_balance_loss_moves_the_load_toward_balance(tiny_config, seq_aux):
    layer = moe_layer(tiny_config(use_moe=True, seq_aux=seq_aux, aux_loss_alpha=1.0))
    x = torch.randn(4, 64, 32) + 0.5  # a common direction, so that some expert is everyone's favourite
    optimizer = torch.optim.SGD([layer.gate.weight], lr=0.3)
    losses, loads = [], []
    for _ in range(40):
        loss = layer(x, None)[1]
        losses.append(loss.item())
        loads.append(max(layer.load.tolist()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loads[0] > 0.35 and losses[0] > 1.1
    assert max(loads[-5:]) < 0.3 and losses[-1] < 1.05


# ---------------------------------------------------------------- precision, dropout, checkpointing, compiling


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_lower_precision(tiny_model, path, dtype, moe, autocast):
    model, ids = tiny_model(use_moe=moe, **path), random_ids(2, 70)
    documents = torch.ones(2, 70).int()
    documents[:, 40:] = 2
    want, want_aux = model(ids, documents=documents)
    model = model if autocast else model.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        logits, aux = model(ids, documents=documents)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()) + aux
    assert logits.dtype == dtype and aux.dtype == torch.float32
    assert (logits - want).norm() < (0.2 if moe else 0.03) * want.norm()  # rounding sends some tokens to other experts
    assert aux.item() == pytest.approx(want_aux.item(), rel=0.05)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_statistics_are_float32(dtype):
    """Squares of 300 are beyond float16; a mean in bfloat16 is off by much more than the result's rounding."""
    norm, x = RMSNorm(512, 1e-5), (300 * torch.randn(8, 512)).to(dtype)
    want = norm(x.float())
    assert ((norm.to(dtype)(x) - want).abs() <= torch.finfo(dtype).eps * want.abs()).all()


def test_dropout_only_in_training(tiny_model):
    model, ids = tiny_model(dropout=0.3), random_ids(2, 20)
    model.eval()
    want = model(ids)[0]
    assert torch.equal(model(ids)[0], want)
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])
    zeros = []
    for block in model.layers:
        block.dropout.register_forward_hook(lambda module, args, out: zeros.append((out == 0).float().mean()))
    model.dropout.register_forward_hook(lambda module, args, out: zeros.append((out == 0).float().mean()))
    model(ids)
    assert len(zeros) == 5  # embeddings, and attention and feed-forward of two layers
    assert all(0.25 < share < 0.35 for share in zeros)


@pytest.mark.parametrize("moe", [False, True])
def test_grad_checkpoint_recomputes_and_changes_nothing(tiny_model, moe):
    model, ids = tiny_model(use_moe=moe, dropout=0.1).train(), random_ids(2, 100)
    documents = torch.ones(2, 100).int()
    documents[:, 40:] = 2
    calls, gradients = [], []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.grad_checkpoint in (False, True):
        calls.clear()
        torch.manual_seed(1)
        model.zero_grad()
        logits, aux = model(ids, documents=documents)
        (logits.logsumexp(-1).mean() + aux).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert len(calls) == 1 + model.grad_checkpoint
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    calls.clear()
    with torch.no_grad():
        model(ids)
    assert len(calls) == 1


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_compiled(model: Transformer, packed: bool, **options) -> None:
    """Logits, balance loss and gradients are those of the model as it stands."""
    ids, documents = random_ids(2, 70), torch.ones(2, 70).int()
    documents[0, 30:], documents[1, 50:] = 2, 0
    results = []
    for each in (model, torch.compile(model, **options)):
        model.zero_grad()
        logits, aux = each(ids, documents=documents if packed else None)
        (logits.float().logsumexp(-1).mean() + aux).backward()
        results.append([logits, aux, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 2e-5)


@pytest.mark.parametrize("moe", [False, True])
def test_torch_compile_traces(tiny_model, moe, fresh_compiler):
    check_compiled(tiny_model(use_moe=moe, n_layers=1), packed=True, backend="eager")


def test_blocks_are_for_cpus_without_compiler(tiny_model, monkeypatch, fresh_compiler):
    """The values are the same either way; this is about speed, and about the size of a traced graph."""
    calls, blocks = [], BlockAttention.blocks
    monkeypatch.setattr(BlockAttention, "blocks", lambda *args: calls.append(1) or blocks(*args))
    model, ids = tiny_model(), random_ids(1, 70)
    model(ids)
    assert len(calls) == 2  # layers
    torch.compile(model, backend="eager")(ids)
    assert len(calls) == 2
    assert not model_module.use_block_attention(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("moe", [False, True])
def test_torch_compile(tiny_model, moe, fresh_compiler):
    model = tiny_model(use_moe=moe, n_layers=1)
    check_compiled(model, packed=True)
    ids, cache = random_ids(2, 70), KVCache(model.config, 2, 70)
    compiled = torch.compile(model)
    with torch.no_grad():
        got = torch.cat([compiled(chunk, cache=cache)[0] for chunk in ids.split([60, 1, 1, 8], 1)], 1)
        assert_near(got, model(ids)[0], 2e-5)


# ---------------------------------------------------------------- other devices


@pytest.fixture(params=["cuda", "mps"])
def accelerator(request) -> str:
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not available[request.param]:
        pytest.skip(f"this machine has no {request.param} device")
    return request.param


@pytest.mark.parametrize("moe", [False, True])
def test_accelerator_computes_what_the_cpu_does(tiny_model, accelerator, moe):
    """Whole rows, packed rows and a padded batch: logits, balance loss and gradients in float32."""
    model, ids = tiny_model(use_moe=moe), random_ids(2, 70)
    real = torch.ones(2, 70, dtype=torch.bool)
    real[0, :30] = False
    documents = torch.ones(2, 70).int()
    documents[0, 30:], documents[1, 50:] = 2, 0
    other = copy.deepcopy(model).to(accelerator)
    for name, mask in ((None, None), ("documents", documents), ("attention_mask", real)):
        results = []
        for each, device in ((model, "cpu"), (other, accelerator)):
            each.zero_grad()
            logits, aux = each(ids.to(device), **({name: mask.to(device)} if name else {}))
            shown = logits if name != "attention_mask" else logits[real.to(device)]
            (shown.logsumexp(-1).mean() + aux).backward()
            results.append([x.cpu() for x in (shown, aux, *(p.grad for p in each.parameters()))])
        for a, b in zip(*results, strict=True):
            assert_near(a, b, 1e-4)


@pytest.mark.parametrize("moe", [False, True])
@torch.no_grad()
def test_accelerator_cache(tiny_model, accelerator, moe):
    model, ids = tiny_model(use_moe=moe).to(accelerator), random_ids(2, 40).to(accelerator)
    mask = torch.ones(2, 40, dtype=torch.bool, device=accelerator)
    mask[1, :20] = False
    for arguments in ({}, dict(attention_mask=mask)):
        cache, got, end = KVCache(model.config, 2, 40, device=accelerator), [], 0
        for chunk in ids.split([30, 1, 1, 8], 1):
            end += chunk.shape[1]
            masks = {name: value[:, :end] for name, value in arguments.items()}
            got.append(model(chunk, cache=cache, **masks)[0])
        want = model(ids, **arguments)[0]
        assert_near(torch.cat(got, 1)[mask], want[mask], 1e-4)


@pytest.mark.parametrize("moe", [False, True])
def test_accelerator_trains_in_bfloat16(tiny_model, accelerator, moe):
    model, ids = tiny_model(use_moe=moe).to(accelerator), random_ids(2, 70).to(accelerator)
    documents = torch.ones_like(ids)
    documents[:, 40:] = 2
    want, _ = model(ids, documents=documents)
    with torch.autocast(accelerator, dtype=torch.bfloat16):
        logits, aux = model(ids, documents=documents)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()) + aux
    assert (logits - want).norm() < (0.2 if moe else 0.03) * want.norm()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (dict(dim=0), "dim"),
        (dict(n_layers=0), "n_layers"),
        (dict(n_heads=-1), "n_heads"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(max_seq_len=0), "max_seq_len"),
        (dict(dim=100), "dim 100 .* n_heads 16"),
        (dict(dim=48), "head size .* 3"),
        (dict(n_kv_heads=3), "n_heads 16 .* n_kv_heads 3"),
        (dict(hidden_dim=0), "hidden_dim"),
        (dict(dropout=1.0), "dropout"),
        (dict(use_moe=True, num_experts_per_tok=5), "num_experts_per_tok 5 .* n_routed_experts 4"),
        (dict(use_moe=True, num_experts_per_tok=0), "num_experts_per_tok"),
        (dict(use_moe=True, n_shared_experts=-1), "n_shared_experts"),
        (dict(use_moe=True, scoring_func="sigmoid"), "scoring_func 'sigmoid'"),
    ],
)
def test_contradicting_numbers_are_named(overrides, names):
    with pytest.raises(ValueError, match=names):
        LMConfig(**overrides)


def test_config_round_trip_and_v1s_values():
    config = LMConfig.from_size("moe", rope_theta=1e6, n_shared_experts=True, n_kv_heads=None)
    assert (config.n_shared_experts, config.n_kv_heads, config.name_suffix) == (1, 16, "512_moe")
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LMConfig(n_shared_experts=None).n_shared_experts == LMConfig(n_shared_experts=False).n_shared_experts == 0
    with pytest.raises(ValueError, match="'n_head'"):
        LMConfig.from_dict({"n_head": 8})
    with pytest.raises(ValueError, match="'huge'.*" + ".*".join(SIZES)):
        LMConfig.from_size("huge")


@pytest.mark.parametrize(("dim", "width"), [(512, 1408), (768, 2048), (256, 704)])
def test_feed_forward_width_is_v1s_rule(dim, width):
    assert LMConfig(dim=dim).ffn_dim == width
    assert FeedForward(dim, width).w2.weight.shape == (dim, width)
    assert LMConfig(dim=dim, hidden_dim=100).ffn_dim == 100
