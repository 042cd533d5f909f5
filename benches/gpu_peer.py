"""nano-vLLM's workload on plain PyTorch: what strand is compared with on the same GPU.

A Qwen3-0.6B-shaped decoder with random weights, batched decoding over one padded KV cache with
scaled_dot_product_attention, decode steps captured as CUDA graphs by batch size. Prompts and
lengths are those of `strand bench throughput` (the same generator and seed). Sequences that end
leave the batch when it is next made smaller; there is no paging and no queue: all fit.

    python3 benches/gpu_peer.py [--device cuda] [--num-seqs 256]
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F

MASK = (1 << 64) - 1


class Random:
    """SplitMix64, as cli/bench/workload.rs draws."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def within(self, low, high):
        return low + ((self.next() * (high - low + 1)) >> 64)


class Model:
    """Qwen3-0.6B's shape."""

    hidden, inner, layers, heads, kv_heads, head_dim, vocab = 1024, 3072, 28, 16, 8, 128, 151936

    def __init__(self, device, dtype):
        make = lambda *shape: torch.randn(*shape, device=device, dtype=dtype) * 0.02
        ones = lambda n: torch.ones(n, device=device, dtype=dtype)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.embed = make(self.vocab, self.hidden)
        self.norm = ones(self.hidden)
        self.parts = [
            dict(
                norm1=ones(self.hidden), norm2=ones(self.hidden),
                q_norm=ones(self.head_dim), k_norm=ones(self.head_dim),
                qkv=make(q + 2 * kv, self.hidden), o=make(self.hidden, q),
                gate_up=make(2 * self.inner, self.hidden), down=make(self.hidden, self.inner),
            )
            for _ in range(self.layers)
        ]
        pairs = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        self.frequencies = 1.0 / (1e6**pairs)

    def rotate(self, x, positions):
        """x (batch, heads, tokens, head_dim), positions (batch, tokens)."""
        angles = positions[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, ids, positions, cache, attend, last):
        """Logits of the rows `last` picks; `attend(layer, q, k, v)` stores and attends."""
        x = F.embedding(ids, self.embed)
        batch, tokens = ids.shape
        for index, part in enumerate(self.parts):
            h = F.rms_norm(x, (self.hidden,), part["norm1"], 1e-6)
            qkv = F.linear(h, part["qkv"]).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q = self.rotate(F.rms_norm(q, (self.head_dim,), part["q_norm"], 1e-6), positions)
            k = self.rotate(F.rms_norm(k, (self.head_dim,), part["k_norm"], 1e-6), positions)
            h = attend(cache[index], q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
            x = x + F.linear(h, part["o"])
            h = F.rms_norm(x, (self.hidden,), part["norm2"], 1e-6)
            gate, up = F.linear(h, part["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, part["down"])
        x = F.rms_norm(last(x), (self.hidden,), self.norm, 1e-6)
        return F.linear(x, self.embed).float()


def sample(logits, temperature):
    """By exponential noise, as nano-vLLM draws."""
    probabilities = torch.softmax(logits / temperature, dim=-1)
    noise = torch.empty_like(probabilities).exponential_(1).clamp_min_(1e-10)
    return (probabilities / noise).argmax(dim=-1)


class Decoder:
    """Decode steps over the first `batch` rows of the cache, captured where there are graphs."""

    def __init__(self, model, cache, temperature, device):
        self.model, self.cache, self.temperature = model, cache, temperature
        self.device, self.graphs, self.pool = device, {}, None
        rows = cache[0][0].shape[0]
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.room = cache[0][0].shape[2]

    def compute(self, batch, room):
        positions = self.positions[:batch]
        seen = torch.arange(room, device=self.device)[None, None, None, :]
        mask = seen <= positions[:, None, :, None]

        def attend(layer, q, k, v):
            for store, new in zip(layer, (k, v)):
                index = positions[:, None, :, None].expand(-1, new.shape[1], 1, new.shape[3])
                store[:batch].scatter_(2, index, new)
            keys, values = (store[:batch, :, :room] for store in layer)
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, enable_gqa=True
            )

        logits = self.model.forward(
            self.ids[:batch], positions, self.cache, attend, lambda x: x[:, -1]
        )
        return sample(logits, self.temperature)

    def step(self, batch, room):
        """The longest sequence has at most `room` tokens."""
        room = min(self.room, -(-room // 256) * 256)
        if self.device == "cpu":
            return self.compute(batch, room)
        if (batch, room) not in self.graphs:
            self.compute(batch, room)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                tokens = self.compute(batch, room)
            self.pool = self.pool or graph.pool()
            self.graphs[batch, room] = (graph, tokens)
        graph, tokens = self.graphs[batch, room]
        graph.replay()
        return tokens


def prefill(model, cache, prompts, temperature, device):
    """One prompt after another: nothing is padded."""

    def attend_to(row):
        def attend(layer, q, k, v):
            tokens = k.shape[2]
            layer[0][row, :, :tokens], layer[1][row, :, :tokens] = k[0], v[0]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return attend

    first = []
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=device)
        positions = torch.arange(len(prompt), device=device)[None]
        logits = model.forward(ids, positions, cache, attend_to(row), lambda x: x[:, -1])
        first.append(sample(logits, temperature))
    return torch.cat(first)


def sizes(rows):
    """Batch sizes that are captured, largest first."""
    found = {rows, 1}
    found.update(size for size in (2, 4, 8) if size < rows)
    found.update(range(16, rows, 16))
    return sorted(found, reverse=True)


def run(decoder, prompts, lengths):
    """Longest answers first, so that those that end are the last rows."""
    model, cache, device = decoder.model, decoder.cache, decoder.device
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    prompts, lengths = [prompts[i] for i in order], [lengths[i] for i in order]
    tokens = prefill(model, cache, prompts, decoder.temperature, device)
    position = torch.tensor([len(prompt) for prompt in prompts], device=device)
    made = len(prompts)
    longest = max(len(prompt) for prompt in prompts)
    for step in range(1, max(lengths)):
        live = sum(length > step for length in lengths)
        batch = min(size for size in sizes(len(prompts)) if size >= live)
        decoder.ids[:batch, 0] = tokens[:batch]
        decoder.positions[:batch, 0] = position[:batch]
        tokens = decoder.step(batch, longest + step).clone()
        position = position[:batch] + 1
        made += live
    if device != "cpu":
        torch.cuda.synchronize()
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--min-input-len", type=int, default=100)
    parser.add_argument("--max-input-len", type=int, default=1024)
    parser.add_argument("--min-output-len", type=int, default=100)
    parser.add_argument("--max-output-len", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random = Random(args.seed)
    prompts = []
    for _ in range(args.num_seqs):
        length = random.within(args.min_input_len, args.max_input_len)
        prompts.append([random.within(0, 10_000) for _ in range(length)])
    lengths = [random.within(args.min_output_len, args.max_output_len) for _ in prompts]
    torch.manual_seed(args.seed)
    device, dtype = args.device, torch.bfloat16
    with torch.inference_mode():
        model = Model(device, dtype)
        room = max(map(len, prompts)) + max(lengths)
        room = -(-room // 256) * 256
        shape = (args.num_seqs, model.kv_heads, room, model.head_dim)
        cache = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            for _ in range(model.layers)
        ]
        decoder = Decoder(model, cache, args.temperature, device)
        run(decoder, prompts, lengths)  # once before, so that every graph is there
        started = time.perf_counter()
        made = run(decoder, prompts, lengths)
        seconds = time.perf_counter() - started
    print(json.dumps({
        "bench": "throughput",
        "peer": f"PyTorch {torch.__version__}, padded cache, SDPA, CUDA graphs",
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": made,
        "seconds": seconds,
        "output_tokens_per_second": made / seconds,
    }))


if __name__ == "__main__":
    main()
