"""The transformer: tensor maths only. No sampling, no files, no process groups.

Shape letters: B batch, T tokens of this call, S tokens attended to (cached and new), D model dim, H query
heads, K key/value heads, G = H / K query heads that share one key/value head, C head dim, V vocabulary,
E routed experts, F width inside SwiGLU, N tokens or chosen positions as one flat list.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model.LMConfig import LMConfig

QUERY_BLOCK = 64  # rows of the score matrix that BlockAttention holds at a time; measured best of 32, 64, 128


class RMSNorm(nn.Module):
    """x / root-mean-square(x) * weight, statistics in float32.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return x32.type_as(x) * self.weight


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation of every pair of channels at every position, float32.

    Shapes: positions (B, T) or (1, T) -> two of (B, T, 1, C / 2).
    Source: Su et al. 2021, "RoFormer", equation 15; pair i turns by theta^(-2i/C) a position.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * theta ** (-pairs / head_dim)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels (x[2i], x[2i+1]) by its angle: the layout of Meta's Llama and v1.

    Shapes: x (B, T, heads, C); cos, sin (B, T, 1, C / 2).
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class KVCache:
    """Keys and values of the tokens seen so far, for all layers; preallocated, filled from the left.

    Shapes: k, v (layers, B, K, max_len, C); real (B, max_len) bool, False where a row holds padding.
    """

    def __init__(
        self,
        config: LMConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.real = torch.ones(batch_size, max_len, dtype=torch.bool, device=device)
        self.has_padding = False
        self.length = 0  # columns in use

    @property
    def max_len(self) -> int:
        return self.k.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores this call's keys and values (B, K, T, C); returns those of all tokens (B, K, S, C)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` columns."""
        self.length = min(self.length, length)
        self.real[:, self.length :] = True

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows of the batch (indices), in that order."""
        self.k, self.v, self.real = self.k[:, rows], self.v[:, rows], self.real[rows]


class BlockAttention(torch.autograd.Function):
    """Causal attention for CPUs: plain matrix products, one block of queries at a time.

    torch's CPU kernel spends most of a small model's training step in its backward pass at head size 32. Here
    a block's scores stay in the processor's cache, the G query heads of a group go through one product with
    their shared keys, and keys before the first document of the block are skipped. The backward pass computes
    the scores again, so memory grows with T, not T^2.

    Shapes: q (B, H, T, C), k and v (B, K, T, C), starts (B, T) int: for every query the first key of its
    document; None: one document. Returns (B, H, T, C).
    Source: Dao et al. 2022, "FlashAttention", algorithm 4 for the backward pass (D = rowsum(dO * O)).
    """

    @staticmethod
    def weights(q: Tensor, k: Tensor, block: tuple[int, int, int], starts: Tensor | None) -> Tensor:
        """The softmaxed scores of queries [begin, end) against keys [first, end): (B * K, G * L, end - first)."""
        begin, end, first = block
        scores = torch.bmm(q, k.transpose(1, 2))
        if starts is None:  # only the last block of keys has a future to hide
            future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu_(1)
            scores.view(len(scores), -1, end - begin, end - first)[..., begin - first :].masked_fill_(future, -math.inf)
        else:
            keys, queries = torch.arange(first, end), torch.arange(begin, end)
            hidden = (keys > queries[:, None]) | (keys < starts[:, begin:end, None])  # (B, L, end - first)
            scores.view(len(starts), -1, end - begin, end - first).masked_fill_(hidden[:, None], -math.inf)
        return torch.softmax(scores, -1)

    @staticmethod
    def blocks(length: int, starts: Tensor | None) -> list[tuple[int, int, int]]:
        """(begin, end, first): queries [begin, end) see no key before `first`."""
        begins = range(0, length, QUERY_BLOCK)
        firsts = [0] * len(begins) if starts is None else starts[:, ::QUERY_BLOCK].amin(0).tolist()
        return [(begin, min(begin + QUERY_BLOCK, length), first) for begin, first in zip(begins, firsts, strict=True)]

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
        B, H, T, C = q.shape
        K = k.shape[1]
        q = (q * C**-0.5).reshape(B * K, H // K, T, C)
        k, v = k.reshape(B * K, T, C), v.reshape(B * K, T, C)
        out = torch.empty_like(q)
        for block in BlockAttention.blocks(T, starts):
            begin, end, first = block
            p = BlockAttention.weights(q[:, :, begin:end].flatten(1, 2), k[:, first:end], block, starts)
            out[:, :, begin:end] = torch.bmm(p, v[:, first:end]).unflatten(1, (-1, end - begin))
        ctx.save_for_backward(q, k, v, out, starts)
        return out.view(B, H, T, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, starts = ctx.saved_tensors
        B, H, T, C = grad.shape
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in BlockAttention.blocks(T, starts):
            begin, end, first = block
            q_, out_, grad_ = (x[:, :, begin:end].flatten(1, 2) for x in (q, out, grad))
            k_, v_ = k[:, first:end], v[:, first:end]
            p = BlockAttention.weights(q_, k_, block, starts)
            grad_v[:, first:end] += torch.bmm(p.transpose(1, 2), grad_)
            row = (grad_ * out_).sum(-1, keepdim=True, dtype=torch.float32).type_as(p)
            grad_s = torch.bmm(grad_, v_.transpose(1, 2)).sub_(row).mul_(p)
            grad_q[:, :, begin:end] = torch.bmm(grad_s, k_).unflatten(1, (-1, end - begin))
            grad_k[:, first:end] += torch.bmm(grad_s.transpose(1, 2), q_)
        return grad_q.mul_(C**-0.5).view(B, H, T, C), grad_k.view(B, -1, T, C), grad_v.view(B, -1, T, C), None


def use_block_attention(device: torch.device) -> bool:
    """True on CPUs, unless torch.compile is tracing: it would unroll the loops into a huge graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def document_starts(documents: Tensor) -> Tensor:
    """For every token the index in its row of the first token of its document. Shapes: (B, T) -> (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device)
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(is_start, index, 0).cummax(1).values


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Source: Ainslie et al. 2023, "GQA"; Vaswani et al. 2017, equation 1.
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotary: tuple[Tensor, Tensor],
        layer: int,
        cache: KVCache | None,
        starts: Tensor | None,
        mask: Tensor | None,  # (B, 1, T, S) bool, True where a query may look
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None,
    ) -> Tensor:
        q, k, v = self.project(x, rotary)
        if attend is not None:
            return self.wo(attend(layer, q, k, v).flatten(2))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, T, C)
        if cache is not None:
            k, v = cache.append(layer, k, v)
            q = q.type_as(k)
        if not self.config.flash_attn:
            out = written_out_attention(q, k, v, starts, mask)
        elif q.shape[2] == 1:  # one new token: the G heads of a group are G queries of one head
            grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(q.shape)
        elif mask is None and use_block_attention(q.device):
            out = BlockAttention.apply(q, k, v, starts)
        else:
            out = fused_attention(q, k, v, starts, mask)
        return self.wo(out.transpose(1, 2).flatten(2).type_as(x))

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, C), keys and values (B, T, K, C); queries and keys turned to their positions."""
        heads = (-1, self.config.head_dim)
        q, k, v = (w(x).unflatten(-1, heads) for w in (self.wq, self.wk, self.wv))
        return rotate(q, *rotary), rotate(k, *rotary), v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, mask: Tensor | None) -> Tensor:
    """torch's attention kernels, around their traps. Shapes: as of written_out_attention.

    enable_gqa loses the fused kernels where a mask is given on CUDA, and aborts the process on Apple GPUs in
    torch 2.6 (pytorch issue 149132): heads are copied instead. is_causal sees the future on Apple GPUs in
    16 bits (pytorch issue 195910), so the mask is written out there.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if mask is None and (starts is not None or q.device.type == "mps"):
        mask = causal_mask(q.shape[2], k.shape[2], q.device, starts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V as the equation says, scores in float32: the reference for the fast paths.

    Shapes: q (B, H, T, C), k and v (B, K, S, C), mask (B, 1, T, S); returns (B, H, T, C).
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device, starts)
    scores = (q.float() @ k.float().transpose(2, 3)) * q.shape[3] ** -0.5
    return scores.masked_fill(~mask, -math.inf).softmax(-1).type_as(v) @ v


def causal_mask(num_queries: int, num_keys: int, device: torch.device, starts: Tensor | None = None) -> Tensor:
    """(1 or B, 1, T, S) bool: query t, the last of T, sees the keys up to its own, from its document's start."""
    keys = torch.arange(num_keys, device=device)
    queries = keys[num_keys - num_queries :, None]
    mask = (keys <= queries)[None, None]
    return mask if starts is None else mask & (keys >= starts[:, None, :, None])


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """The weight matrix that scores every expert for every token."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))


class MoE(nn.Module):
    """Every token goes through its top experts, weighted by the router, and through the shared expert.

    Tokens are sorted by expert, each expert runs once on its own tokens, and the results are added back where
    they came from: no token is dropped, and training and inference compute the same.
    Source: Dai et al. 2024, "DeepSeekMoE", equations 9 to 11 (shared expert), 12 to 16 (balance).
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = nn.ModuleList(FeedForward(config.dim, config.ffn_dim) for _ in range(config.n_routed_experts))
        if config.n_shared_experts:
            self.shared_experts = FeedForward(config.dim, config.ffn_dim * config.n_shared_experts)
        self.load: Tensor | None = None  # (E,) share of the last call's assignments that each expert got

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shapes: x (B, T, D), real (B, T) bool or None; returns (B, T, D) and the balance loss, 0-dim float32."""
        config = self.config
        flat = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 near ties would go to another expert
            probs = F.linear(flat.float(), self.gate.weight.float()).softmax(-1)  # (N, E)
        weights, chosen = probs.topk(config.num_experts_per_tok, dim=-1)  # (N, k)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:  # a lone 1 would teach the router nothing
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)

        order = chosen.flatten().argsort(stable=True)  # assignments, those of expert 0 first
        token = order // config.num_experts_per_tok
        counts = chosen.flatten().bincount(minlength=config.n_routed_experts)
        parts = flat[token].split(counts.tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        done = done.float() * weights.flatten()[order, None]
        out = torch.zeros_like(flat, dtype=torch.float32).index_add(0, token, done).type_as(x).view_as(x)
        if config.n_shared_experts:
            out = out + self.shared_experts(x)
        return out, self.balance_loss(probs.view(*x.shape[:2], -1), chosen.view(*x.shape[:2], -1), real)

    def balance_loss(self, probs: Tensor, chosen: Tensor, real: Tensor | None) -> Tensor:
        """alpha * sum_e f_e P_e: f_e the share of choices that fell on expert e, times E; P_e its mean weight.

        Least, alpha, when every expert is chosen equally often. Padding counts for nothing.
        Shapes: probs (B, T, E), chosen (B, T, k), real (B, T) bool or None.
        """
        E = self.config.n_routed_experts
        picks = F.one_hot(chosen, E).sum(2).float()  # (B, T, E)
        tokens = torch.ones_like(probs[..., 0]) if real is None else real.float()  # (B, T)
        picks, probs = picks * tokens[..., None], probs * tokens[..., None]
        dims = 1 if self.config.seq_aux else (0, 1)
        count = tokens.sum(dims).clamp(min=1)[..., None]
        f = picks.sum(dims) / (count * self.config.num_experts_per_tok) * E
        loss = (f * probs.sum(dims) / count).sum(-1).mean()
        self.load = (picks.sum((0, 1)) / picks.sum().clamp(min=1)).detach()
        return self.config.aux_loss_alpha * loss


class TransformerBlock(nn.Module):
    """h = x + attention(norm(x)); out = h + feed_forward(norm(h))."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = MoE(config) if config.use_moe else FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, layer, cache, starts, mask, real, attend) -> tuple[Tensor, Tensor | None]:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, layer, cache, starts, mask, attend))
        h, aux = self.ffn_norm(x), None
        if isinstance(self.feed_forward, MoE):
            h, aux = self.feed_forward(h, real)
        else:
            h = self.feed_forward(h)
        return x + self.dropout(h), aux


class Transformer(nn.Module):
    """MiniMind's language model; state-dict keys and shapes are exactly v1's."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # True: blocks are computed again in the backward pass, to save memory
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight  # tied: one tensor under two names
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02); projections that add into the residual stream N(0, 0.02 / sqrt(2 * layers)).

        Source: Radford et al. 2019, "GPT-2", section 2.3. v1 scaled w3 by mistake; the projection is w2.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def num_parameters(self, active: bool = False) -> int:
        """All parameters, the tied one once; `active`: only those that a single token goes through."""
        total = sum(p.numel() for p in self.parameters())
        config = self.config
        if active and config.use_moe:
            idle = config.n_routed_experts - config.num_experts_per_tok
            total -= config.n_layers * idle * 3 * config.dim * config.ffn_dim
        return total

    def expert_load(self) -> list[float] | None:
        """Share of the last forward pass that went to each expert, mean over layers; None for a dense model."""
        loads = [layer.feed_forward.load for layer in self.layers if isinstance(layer.feed_forward, MoE)]
        return torch.stack(loads).mean(0).tolist() if loads and loads[0] is not None else None

    def forward(
        self,
        input_ids: Tensor,
        *,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        select: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Next-token logits (B, T, V), and the MoE balance loss (0-dim float32, 0 for a dense model).

        select: (B, T) bool; logits come for these positions only, as (N, V) in row-major order. The other
        arguments are those of hidden_states.
        """
        x, balance = self.hidden_states(
            input_ids, documents=documents, attention_mask=attention_mask, positions=positions, cache=cache
        )
        if select is not None:
            x = x[select]
        return self.output(self.norm(x)), balance

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the last block gives, (B, T, D), before the last norm and the output layer; and the MoE balance loss.

        Args:
            input_ids: (B, T) int64.
            documents: (B, T) int, for packed rows: a token sees its own document only; 0 marks padding.
            attention_mask: (B, S) bool, False where a padded batch holds no token, left or right.
            positions: (B, T) int, when not 0, 1, 2, ... over the real tokens of the row.
            cache: keys and values of the tokens before these, extended in place by this call.
            attend: takes the place of attention: (layer, q (B, T, H, C), k and v (B, T, K, C)) to (B, T, H, C).
        """
        B, T = input_ids.shape
        device = input_ids.device
        past = cache.length if cache is not None else 0
        if cache is not None and past + T > cache.max_len:
            raise ValueError(f"the cache holds {cache.max_len} tokens; {past} + {T} do not fit")

        real = mask = starts = None
        if documents is not None:
            if cache is not None or attention_mask is not None:
                raise ValueError("documents is for packed rows; it goes without cache and attention_mask")
            real = documents > 0
            starts = document_starts(documents)
            if not use_block_attention(device):
                mask = causal_mask(T, T, device, starts)
        if attention_mask is not None and cache is not None:
            cache.real[:, past : past + T] = attention_mask[:, -T:]
            cache.has_padding = True
        if cache is not None and cache.has_padding:
            attention_mask = cache.real[:, : past + T]
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            real = attention_mask[:, -T:]
            mask = causal_mask(T, past + T, device) & attention_mask[:, None, None]
            mask = mask | torch.eye(T, past + T, dtype=torch.bool, device=device).roll(past, 1)  # padding sees itself
            if positions is None:
                positions = (attention_mask.cumsum(1)[:, -T:] - 1).clamp(min=0)
        elif past and T > 1:  # a chunk of a prompt: is_causal would align it to the wrong end of the keys
            mask = causal_mask(T, past + T, device)
        if positions is None:
            positions = torch.arange(past, past + T, device=device)[None]

        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = self.dropout(self.tok_embeddings(input_ids))
        balance = []
        for index, block in enumerate(self.layers):
            inputs = (x, rotary, index, cache, starts, mask, real, attend)
            if self.grad_checkpoint:
                x, aux = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, aux = block(*inputs)
            if aux is not None:
                balance.append(aux)
        if cache is not None:
            cache.length = past + T
        return x, torch.stack(balance).sum() if balance else x.new_zeros((), dtype=torch.float32)
