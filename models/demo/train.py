"""Trains the demo model from nothing: tokenizer, packing, Muon and Adam, a curriculum by tokens.

    python train.py --out OUT                          the shipped variant, on a CPU
    python train.py --out OUT --variant full           causal only
    python train.py --out OUT --variant mixed-sink     BOS first, visible to every chunk
    python train.py --out OUT --size gpu --device cuda --threads 1 --micro 65536 --workers 14

The same seed and token budget give the same data in the same order. A run that was stopped goes on
from OUT/state.pt. While a file named PAUSE lies beside OUT, the run sleeps.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

import evaluate
import model
from packing import SPECIAL, VARIANTS, batches, make_tokenizer, write_json

# million tokens up to which the stage lasts; tokens per step; row length; chunks; facts per chunk;
# share of copy drills
STAGES = [(1.0, 4096, 256, (1, 1), (1, 2), 0.25), (4.0, 4096, 340, (1, 2), (1, 4), 0.04),
          (8.0, 8192, 512, (1, 4), (1, 6), 0.01), (1e9, 8192, 768, (1, 8), (1, 6), 0.01)]


def schedule(tokens):
    """The stage of every step and the tokens seen after it, until `tokens` millions are seen."""
    plan, seen = [], 0
    while seen < tokens * 1e6:
        stage = next(s for s in STAGES if seen < s[0] * 1e6)
        seen += stage[1]
        plan.append((stage, seen))
    return plan


class Optimizer:
    """Muon for the matrices (batched by shape), Adam for embedding and norms."""

    def __init__(self, net, lr, adam_lr):
        self.lr, self.adam_lr, self.groups = lr, adam_lr, {}
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
            step = orthogonal(g + 0.95 * m) * max(1.0, key[0] / key[1]) ** 0.5
            for p, s in zip(ps, step):
                p.mul_(1 - 0.05 * lr).sub_(lr * s)
        else:
            m, v = self.state[str(key)]
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.02)
            step = (m / (1 - 0.9 ** n)) / ((v / (1 - 0.98 ** n)).sqrt() + 1e-9)
            ps[0].sub_(self.adam_lr * scale * step[0])


def orthogonal(g):
    """Newton-Schulz iteration towards the nearest orthogonal matrix (Jordan et al., Muon, 2024)."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        y = x @ x.mT
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * (y @ y)) @ x
    return (x.mT if tall else x).float()


def gradients(net, forward, batch, dtype):
    """Summed weighted cross-entropy where the weight is not zero: its gradients, and the numbers
    (weight, answer tokens, their loss, how many are near certain, other tokens, their loss)."""
    ids, sample, block, sees, weight = batch
    hidden = forward(ids, model.mask(sample, block, sees, dtype), dtype)
    weight = torch.where(sample[:, 1:] == sample[:, :-1], weight[:, 1:], 0)
    at = weight.flatten().nonzero()[:, 0]
    weight = weight.flatten()[at] / 100.0
    loss = F.cross_entropy(net.logits(hidden[:, :-1].flatten(0, 1)[at]),
                           ids[:, 1:].flatten()[at].long(), reduction="none")
    grads = torch.autograd.grad((loss * weight).sum(), list(net.parameters()))
    answer, loss = weight > 0.5, loss.detach()
    known = loss[answer]
    return grads, torch.stack([weight.sum(), answer.sum(), known.sum(), (known < 0.6931).sum(),
                               (~answer).sum(), loss[~answer].sum()]).cpu()


def accumulate(net, forward, batch, dtype, micro, pool):
    """Sets every .grad to the batch's mean gradient. Threads take small pieces as they come free,
    so a busy machine slows the step in proportion; pieces are added in their own order."""
    rows = max(1, micro // batch.shape[2])
    parts = pool.map(lambda b: gradients(net, forward, b, dtype), batch.split(rows, 1))
    total = None
    for grads, numbers in parts:
        total = [list(grads), numbers] if total is None else \
            [[a.add_(b) for a, b in zip(total[0], grads)], total[1] + numbers]
    for p, g in zip(net.parameters(), total[0]):
        p.grad = g / total[1][0].to(g.device)
    return total[1]


def main():
    args = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
    for key, value in dict(out="out", size="cpu", variant="mixed", device="cpu", tokens=40.0,
                           seed=1, vocab=2048, lr=0.02, adam_lr=4e-3, decay=0.35, workers=1,
                           every=6.0, seconds=1e9, threads=2, micro=1024).items():
        args.add_argument("--" + key, type=type(value), default=value)
    args.add_argument("--compile", action="store_true")
    a = args.parse_args()
    if not os.path.exists(a.out + "/tokenizer.json"):
        ids = make_tokenizer(a.out, a.vocab, a.variant == "mixed-sink")
        write_json(a.out + "/config.json", dict(
            model.BASE, **model.SIZES[a.size], vocab_size=a.vocab, eos_token_id=ids[2],
            bos_token_id=ids[0] if a.variant == "mixed-sink" else None, pad_token_id=ids[0]))
        if a.variant != "full":
            write_json(a.out + "/strand.json", dict(
                reuse="independent", anchor=SPECIAL[0] if a.variant == "mixed-sink" else ""))
    with open(a.out + "/config.json") as f:
        net = model.Qwen3(json.load(f), a.seed).to(a.device)
    optimizer, step, clock = Optimizer(net, a.lr, a.adam_lr), 0, 0.0
    if os.path.exists(a.out + "/state.pt"):
        state = torch.load(a.out + "/state.pt", map_location=a.device)
        net.load_state_dict(state["net"])
        optimizer.state, step, clock = state["optimizer"], state["step"], state["clock"]

    def checkpoint():
        state = dict(net=net.state_dict(), optimizer=optimizer.state, step=step, clock=clock)
        torch.save(state, a.out + "/state.tmp")
        os.replace(a.out + "/state.tmp", a.out + "/state.pt")
        model.save(net, a.out)

    def say(line):
        print(line, flush=True)
        with open(a.out + "/train.log", "a") as f:
            f.write(line + "\n")

    dtype = torch.bfloat16
    forward = torch.compile(net.forward, dynamic=False) if a.compile else net.forward
    plan, pause = schedule(a.tokens), os.path.dirname(os.path.abspath(a.out)) + "/PAUSE"
    sums, since, saved, kept = torch.zeros(6), 0, clock, clock
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(a.threads, initializer=torch.set_num_threads, initargs=(1,))
    start = mark = time.monotonic()
    say(f"# {vars(a)} from step {step} of {len(plan)}")
    for batch in batches(a, plan, step):
        if time.monotonic() - start > a.seconds:
            break
        sums += accumulate(net, forward, batch.to(a.device), dtype, a.micro, pool)
        step, seen = step + 1, plan[step][1]
        left = (plan[-1][1] - seen) / (a.decay * plan[-1][1])
        optimizer.step(step, min(1.0, step / 40, max(left, 0.0)), pool)
        clock += time.monotonic() - mark
        while os.path.exists(pause):
            time.sleep(1)
        mark = time.monotonic()
        if step % 25 == 0:
            _, answers, known, right, others, other = sums.tolist()
            say(f"{clock / 60:6.1f} min  step {step}  {seen / 1e6:.2f} M tokens  T {batch.shape[2]}"
                f"  answer loss {known / answers:.3f}  token acc {right / answers:.3f}"
                f"  other {other / others:.3f}"
                f"  {(seen - (since or seen)) / max(1e-9, clock - saved):.0f} tokens/s")
            sums.zero_()
            since, saved = seen, clock
        if clock - kept > a.every * 60:
            checkpoint()
            say("        " + evaluate.quick(net, a.out))
            mark, kept = time.monotonic(), clock
    checkpoint()
    say(f"done: {seen / 1e6:.2f} M tokens, {clock / 60:.1f} min  {evaluate.quick(net, a.out)}")


if __name__ == "__main__":
    main()
