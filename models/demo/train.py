"""Trains the demo model: Muon and Adam, a curriculum by tokens.

    python train.py --out OUT                          the shipped variant
    python train.py --out OUT --variant full           causal only
    python train.py --out OUT --variant mixed-sink     BOS first, visible to every chunk
    python train.py --out OUT --init FOLDER --mean     a last stage, from trained weights

The same seed and token budget give the same data in the same order. A run that was stopped
(SIGTERM) goes on from OUT/state.pt.
"""

import argparse
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

import model
from chunks import HARD, MIX
from packing import SPECIAL, VARIANTS, batches, make_tokenizer, write_json

# million tokens up to which the stage lasts; tokens per step; row length; chunks; facts per chunk;
# share of copy drills; mix of chunks
STAGES = [(1.0, 4096, 256, (1, 1), (1, 2), 0.25, MIX), (4.0, 4096, 340, (1, 2), (1, 4), 0.04, MIX),
          (8.0, 8192, 512, (1, 4), (1, 6), 0.01, MIX), (14.0, 8192, 768, (1, 8), (1, 6), 0.01, MIX),
          (1e9, 8192, 1024, (1, 8), (2, 6), 0.01, HARD)]


def schedule(tokens, stages):
    """The stage of every step and the tokens seen after it, until `tokens` millions are seen."""
    plan, seen = [], 0
    while seen < tokens * 1e6:
        stage = next(s for s in stages if seen < s[0] * 1e6)
        seen += stage[1]
        plan.append((stage, seen))
    return plan


class Optimizer:
    """Muon for the matrices (batched by shape), Adam for embedding and norms."""

    def __init__(self, net, lr, adam_lr, dtype):
        self.lr, self.adam_lr, self.dtype, self.groups = lr, adam_lr, dtype, {}
        for name, p in net.named_parameters():
            key = tuple(p.shape) if p.ndim == 2 and "embed" not in name else name
            self.groups.setdefault(key, []).append(p)
        self.state = {str(k): [torch.zeros(len(ps), *ps[0].shape, device=ps[0].device)
                               for _ in range(1 if isinstance(k, tuple) else 2)]
                      for k, ps in self.groups.items()}

    @torch.no_grad()
    def step(self, n, scale, pool):
        """Step `n` (from 1) with the learning rates times `scale`; groups run side by side."""
        list(pool.map(lambda key: self.step_group(key, n, scale), self.groups))

    @torch.no_grad()
    def step_group(self, key, n, scale):
        ps = self.groups[key]
        g = torch.stack([p.grad for p in ps])
        if isinstance(key, tuple):
            m, = self.state[str(key)]
            m.mul_(0.95).add_(g)
            lr = self.lr * scale
            step = orthogonal((g + 0.95 * m).to(self.dtype)).float()
            step *= max(1.0, key[0] / key[1]) ** 0.5
            for p, s in zip(ps, step):
                p.mul_(1 - 0.05 * lr).sub_(lr * s)
        else:
            m, v = self.state[str(key)]
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.02)
            step = (m / (1 - 0.9 ** n)) / ((v / (1 - 0.98 ** n)).sqrt() + 1e-9)
            ps[0].sub_(self.adam_lr * scale * step[0])


def orthogonal(x):
    """Newton-Schulz iteration towards the nearest orthogonal matrix (Jordan et al., Muon, 2024)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        y = x @ x.mT
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * (y @ y)) @ x
    return x.mT if tall else x


def gradients(net, forward, batch, dtype):
    """Summed weighted cross-entropy where the weight is not zero: its gradients, and the numbers
    (weight, answer tokens, their loss, how many are near certain)."""
    ids, sample, block, sees, weight = batch
    hidden = forward(ids, model.mask(sample, block, sees, dtype), dtype)
    weight = torch.where(sample[:, 1:] == sample[:, :-1], weight[:, 1:], 0)
    at = weight.flatten().nonzero()[:, 0]
    weight = weight.flatten()[at] / 100.0
    loss = F.cross_entropy(net.logits(hidden[:, :-1].flatten(0, 1)[at]),
                           ids[:, 1:].flatten()[at].long(), reduction="none")
    grads = torch.autograd.grad((loss * weight).sum(), list(net.parameters()))
    known = loss.detach()[weight > 0.5]
    return grads, torch.tensor([weight.sum(), len(known), known.sum(), (known < 0.6931).sum()])


def accumulate(net, forward, batch, dtype, micro, pool):
    """Sets every .grad to the batch's mean gradient. Threads take small pieces as they come free,
    so a busy machine slows the step in proportion; pieces are added in their own order."""
    rows = max(1, micro // batch.shape[2])
    parts = pool.map(lambda b: gradients(net, forward, b, dtype), batch.split(rows, 1))
    grads, numbers = next(parts)
    for more, n in parts:
        grads, numbers = [a.add_(b) for a, b in zip(grads, more)], numbers + n
    for p, g in zip(net.parameters(), grads):
        p.grad = g / numbers[0].to(g.device)
    return numbers


def prepare(a):
    """The folder's tokenizer and configuration: new ones, or those of the weights to start from."""
    if a.init:
        os.makedirs(a.out, exist_ok=True)
        for name in ("tokenizer", "tokenizer_config", "generation_config", "config", "strand"):
            if os.path.exists(f"{a.init}/{name}.json"):
                shutil.copy(f"{a.init}/{name}.json", a.out)
        return
    sink = a.variant == "mixed-sink"
    ids = make_tokenizer(a.out, model.CONFIG["vocab_size"], sink)
    write_json(a.out + "/config.json", dict(
        model.CONFIG, eos_token_id=ids[2], bos_token_id=ids[0] if sink else None,
        pad_token_id=ids[0]))
    if a.variant != "full":
        write_json(a.out + "/strand.json",
                   dict(reuse="independent", anchor=SPECIAL[0] if sink else ""))


def train(a):
    if not os.path.exists(a.out + "/tokenizer.json"):
        prepare(a)
    with open(a.out + "/config.json") as f:
        net = model.Qwen3(json.load(f), a.seed).to(a.device)
    if a.init:
        model.load(net, a.init)
    dtype = torch.float32 if a.f32 else torch.bfloat16
    optimizer, step, clock = Optimizer(net, a.lr, a.adam_lr, dtype), 0, 0.0
    if os.path.exists(a.out + "/state.pt"):
        state = torch.load(a.out + "/state.pt", map_location=a.device)
        net.load_state_dict(state["net"])
        optimizer.state, step, clock = state["optimizer"], state["step"], state["clock"]
    forward = torch.compile(net.forward, dynamic=False) if a.compile else net.forward
    plan, stop = schedule(a.tokens, STAGES[-1:] if a.init else STAGES), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(a.threads, initializer=torch.set_num_threads, initargs=(1,))
    sums, before, mark = torch.zeros(4), (step, clock), time.monotonic()
    with open(a.out + "/train.log", "a", buffering=1) as log:
        print(f"# {vars(a)} from step {step} of {len(plan)}", file=log)
        for batch in batches(a, plan, step):
            if stop.is_set():
                break
            sums += accumulate(net, forward, batch.to(a.device), dtype, a.micro, pool)
            step, seen = step + 1, plan[step][1]
            left = (plan[-1][1] - seen) / (a.decay * plan[-1][1])
            optimizer.step(step, min(1.0, step / 40, max(left, 0.0)), pool)
            clock, mark = clock + time.monotonic() - mark, time.monotonic()
            if step % 25 == 0:
                _, answers, loss, right = sums.tolist()
                print(f"{clock / 60:6.1f} min  step {step}  {seen / 1e6:.2f} M tokens"
                      f"  T {batch.shape[2]}  answer loss {loss / answers:.4f}"
                      f"  token acc {right / answers:.4f}"
                      f"  {(step - before[0]) * plan[step - 1][0][1] / (clock - before[1]):.0f}"
                      " tokens/s", file=log)
                sums, before = torch.zeros(4), (step, clock)
            if step % a.every == 0:
                save(a.out, net, optimizer, step, clock)
    save(a.out, net, optimizer, step, clock)
    if a.mean and step == len(plan):
        first = model.Qwen3(net.config, 0)
        model.load(first, a.init)
        with torch.no_grad():
            for p, q in zip(net.parameters(), first.to(a.device).parameters()):
                p.lerp_(q, 0.5)
        model.save(net, a.out)


def save(out, net, optimizer, step, clock):
    state = dict(net=net.state_dict(), optimizer=optimizer.state, step=step, clock=clock)
    torch.save(state, out + "/state.tmp")
    os.replace(out + "/state.tmp", out + "/state.pt")
    model.save(net, out)


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
    for key, value in dict(out="out", init="", device="cpu", tokens=22.0, seed=1, lr=0.02,
                           adam_lr=4e-3, decay=0.5, workers=1, threads=2, micro=1024,
                           every=100).items():
        args.add_argument("--" + key, type=type(value), default=value)
    args.add_argument("--variant", choices=VARIANTS, default="mixed")
    args.add_argument("--mean", action="store_true",
                      help="ends with the mean of --init's weights and those trained from them")
    args.add_argument("--compile", action="store_true")
    args.add_argument("--f32", action="store_true", help="for processors without bf16 units")
    args = args.parse_args()
    if args.mean and os.path.realpath(args.init or args.out) == os.path.realpath(args.out):
        raise SystemExit("--mean is of --init's weights and those in --out: name another folder")
    train(args)
