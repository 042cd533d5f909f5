"""The network: a plain Qwen3 decoder in PyTorch, with the parameter names of Hugging Face.

Training wants what inference does not: an explicit mask (packed samples, independent chunks) and
logits at a few positions only. Nothing here knows of text, chunks or files other than the weights.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu", rms_norm_eps=1e-6,
    rope_theta=10000.0, rope_scaling=None, max_position_embeddings=4096, tie_word_embeddings=True,
    attention_bias=False, attention_dropout=0.0, use_sliding_window=False, sliding_window=None,
    max_window_layers=0, initializer_range=0.02, torch_dtype="bfloat16", use_cache=True,
    hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=512, vocab_size=2048)


def rms(x, norm):
    f = x.float()
    f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-6)
    return f.to(x.dtype) * norm.weight.to(x.dtype)


def rotate(x, cos, sin):
    """x (rows, tokens, heads, head_dim); the halves are rotated against each other, as in HF."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def linear(x, *projections):
    """One product for several projections of the same input."""
    return F.linear(x, torch.cat([p.weight for p in projections]).to(x.dtype))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, self.dim = c["hidden_size"], c["head_dim"]
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj = nn.Linear(d, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(d, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(d, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, d, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.dim), nn.RMSNorm(self.dim)

    def forward(self, x, cos, sin, bias):
        rows, tokens, _ = x.shape
        qkv = linear(x, self.q_proj, self.k_proj, self.v_proj).view(rows, tokens, -1, self.dim)
        q, k, v = qkv.split([self.heads, self.kv, self.kv], 2)
        q = rotate(rms(q, self.q_norm), cos, sin).transpose(1, 2)
        k = rotate(rms(k, self.k_norm), cos, sin).transpose(1, 2)
        share = self.heads // self.kv
        k, v = k.repeat_interleave(share, 1), v.transpose(1, 2).repeat_interleave(share, 1)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return linear(o.transpose(1, 2).reshape(rows, tokens, -1), self.o_proj)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, f = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x):
        gate, up = linear(x, self.gate_proj, self.up_proj).chunk(2, -1)
        return linear(F.silu(gate) * up, self.down_proj)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.input_layernorm = nn.RMSNorm(c["hidden_size"])
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"])

    def forward(self, x, cos, sin, bias):
        x = x + self.self_attn(rms(x, self.input_layernorm), cos, sin, bias)
        return x + self.mlp(rms(x, self.post_attention_layernorm))


class Qwen3(nn.Module):
    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"])
        dice = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = "o_proj" in name or "down_proj" in name
                std = 0.02 if "embed" in name else (0.2 if last else 1.0) * p.shape[1] ** -0.5
                p.data = torch.randn(p.shape, generator=dice) * std

    def forward(self, tokens, bias, dtype):
        """Final hidden states (rows, tokens, hidden); positions count from 0 in every row."""
        half = self.config["head_dim"] // 2
        steps = torch.arange(half, device=tokens.device, dtype=torch.float32) / half
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        angles = (positions[:, None] * self.config["rope_theta"] ** -steps)[None, :, None]
        cos, sin = angles.cos(), angles.sin()
        x = F.embedding(tokens, self.embed_tokens.weight).to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, bias)
        return rms(x, self.norm)

    def logits(self, hidden):
        return linear(hidden, self.embed_tokens).float()


def mask(sample, block, sees, dtype):
    """Additive mask (rows, 1, tokens, tokens): causal, same sample, and the key's block is one of
    those whose bits are set in the query's `sees`."""
    t = sample.shape[1]
    allowed = torch.ones(t, t, dtype=torch.bool, device=sample.device).tril()
    allowed = allowed & (sample[:, :, None] == sample[:, None])
    allowed &= ((sees[:, :, None] >> block[:, None]) & 1).bool()
    return torch.where(allowed, 0.0, -1e9).to(dtype)[:, None]


def save(net, folder):
    from safetensors.torch import save_file
    weights = {"model." + k: v.detach().to("cpu", torch.bfloat16).contiguous()
               for k, v in net.state_dict().items()}
    save_file(weights, folder + "/model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder + "/model.safetensors.tmp", folder + "/model.safetensors")


def load(net, folder):
    from safetensors.torch import load_file
    weights = load_file(folder + "/model.safetensors")
    net.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
