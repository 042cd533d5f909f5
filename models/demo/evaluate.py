"""Exact match on items held out by seed, and a chat to look at.

    python evaluate.py FOLDER [--n 100]          tables: recall by chunks and encoding, other tasks
    python evaluate.py FOLDER --write eval.jsonl writes the items that `strand bench recall` runs
    python evaluate.py FOLDER --chat FILE...     answers questions from standard input over files

Answers are canonical, so teacher-forced argmax over a whole answer equals exact greedy decoding.
"""

import argparse
import functools
import json
import os
import random
import sys

import torch

import corpus
import model
from packing import encode

FIELDS = dict(summary=str, facts=list, relationship=int, mood=str)


@functools.cache
def tokenizer(folder):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(folder + "/tokenizer.json")


def item(task, name, chunks, system, turns, question, answer, kind, holder):
    chunks = [dict(kind=c["kind"], name=c["name"], content=c["body"]) for c in chunks]
    turns = [dict(user=q, assistant=a) for q, a in turns]
    return dict(id=name, task=task, kind=kind, chunks=chunks, system=system, turns=turns,
                question=question, answer=answer, answer_chunk=holder)


def recall_items(n, seed, n_chunks, facts=(3, 6)):
    """Pairs (answerable, unanswerable) over the same chunks; the second may be None."""
    items = []
    for i in range(n):
        g = corpus.Generator(f"eval-{seed}-{n_chunks}-{i}", facts)
        chunks = [g.chunk() for _ in range(n_chunks)]
        if g.chance(0.15):
            chunks[g.dice.randrange(n_chunks)] = g.persona()
        k = g.dice.randrange(n_chunks)
        f = g.pick(chunks[k]["facts"])
        question, answer = g.pick(f["asks"])
        system, kind = g.system(), f"{chunks[k]['kind']}/{f['a']}"
        known = item("recall", f"recall-{n_chunks}-{i}", chunks, system, [], question, answer,
                     kind, k)
        missing = None
        if chunks[k]["missing"]:
            m = g.pick(chunks[k]["missing"])
            missing = item("missing", f"missing-{n_chunks}-{i}", chunks, system, [],
                           g.pick(m["asks"])[0], corpus.DUNNO, kind.split("/")[0], None)
        items.append((known, missing))
    return items


def stale_items(n, seed):
    """The conversation still holds the answer, but its chunk is no longer active."""
    items = []
    for i in range(n):
        g = corpus.Generator(f"eval-{seed}-stale-{i}", (2, 5))
        chunks, off = [g.chunk() for _ in range(g.some((0, 2)))], g.chunk()
        q, a = g.pick(g.pick(off["facts"])["asks"])
        items.append(item("stale", f"stale-{i}", chunks, None, [(q, a)], q, corpus.DUNNO, "stale",
                          None))
    return items


def dialogue_items(n, seed):
    """Closing JSON analyses, and what the visitor said about himself."""
    items = []
    for i in range(n):
        g = corpus.Generator(f"eval-{seed}-json-{i}")
        p = g.persona()
        chunks = [p] + [g.memory() for _ in range(g.some((0, 1)))]
        turns, (_, answer) = g.dialogue(p, chunks)
        task = corpus.TASK_JSON if answer[0] == "{" else corpus.TASK_SUMMARY
        items.append(item("json" if answer[0] == "{" else "summary", f"json-{i}", chunks, None,
                          turns, task, answer, "npc", None))
        said = [t for t in turns if t[0] in corpus.RECALLS.values()]
        if said:
            at = turns.index(said[0])
            items.append(item("conversation", f"conversation-{i}", chunks, None, turns[:at],
                              *said[0], "npc", None))
    return items


def parts_of(x, chunks, independent):
    parts = [(corpus.render(dict(c, body=c["content"])), i, 1 << i if independent else -1, 0)
             for i, c in enumerate(chunks, 1)]
    if x["system"]:
        parts.append((f"<|im_start|>system\n{x['system']}<|im_end|>\n", 20, -1, 0))
    for t in x["turns"]:
        parts += corpus.turn(t["user"], t["assistant"], 0, -1, weight=0)
    return parts + corpus.turn(x["question"], x["answer"], 0, -1)[:2]


@torch.no_grad()
def exact(net, folder, items, independent=True, chunks=lambda x: x["chunks"],
          dtype=torch.float32, batch=8):
    """For each item: is every answer token the argmax?"""
    device, right = net.norm.weight.device, [False] * len(items)
    rows = [encode(tokenizer(folder), parts_of(x, chunks(x), independent)) for x in items]
    order = sorted(range(len(rows)), key=lambda i: rows[i].shape[1])
    for at in range(0, len(order), batch):
        some = order[at:at + batch]
        x = torch.zeros(5, len(some), max(rows[i].shape[1] for i in some), dtype=torch.int32)
        for j, i in enumerate(some):
            x[:4, j, :rows[i].shape[1]], x[4, j, :rows[i].shape[1]] = rows[i], 1
        x = x.to(device)
        hidden = net(x[0], model.mask(x[4], x[1], x[2], dtype), dtype)
        for j, i in enumerate(some):
            w = x[3, j].nonzero()[:, 0]
            right[i] = bool((net.logits(hidden[j, w - 1]).argmax(-1) == x[0, j, w]).all())
    return right


@torch.no_grad()
def generate(net, folder, parts, limit=120):
    """Greedy, by computing everything again for every token: slow and plain."""
    tok = tokenizer(folder)
    x = encode(tok, parts)
    start, end = x.shape[1], tok.token_to_id("<|im_end|>")
    while x.shape[1] - start < limit and (x.shape[1] == start or x[0, -1] != end):
        one = x[None].transpose(0, 1)
        hidden = net(one[0], model.mask(one[0] * 0, one[1], one[2], torch.float32), torch.float32)
        new = x[:, -1:].clone()
        new[0], new[1], new[2] = net.logits(hidden[0, -1]).argmax(), 0, -1
        x = torch.cat([x, new], 1)
    return tok.decode(x[0, start:].tolist())


def without(x):
    return [c for i, c in enumerate(x["chunks"]) if i != x["answer_chunk"]]


def shuffled(x):
    return random.Random(x["id"]).sample(x["chunks"], len(x["chunks"]))


def rate(right):
    return sum(right) / max(1, len(right))


def unknowable(items):
    """The same with `I don't know.` expected; who one is has an answer without a chunk."""
    return [dict(x, answer=corpus.DUNNO) for x in items if x["kind"] != "persona/name"]


def quick(net, folder, n=32):
    """One line for the training log: independent, chunk absent, attribute missing, by chunks."""
    out = []
    for k in (1, 4, 8):
        pairs = recall_items(n, "quick", k)
        known, missing = [x for x, _ in pairs], [m for _, m in pairs if m]
        score = lambda items, **kw: rate(exact(net, folder, items, dtype=torch.bfloat16, **kw))
        out.append(f"{k}: {score(known):.2f} absent {score(unknowable(known), chunks=without):.2f}"
                   f" missing {score(missing):.2f}")
    return " | ".join(out)


def table(net, folder, n, seed):
    score = lambda items, **kw: f"{100 * rate(exact(net, folder, items, **kw)):.1f}"
    print("| chunks | causal | independent | reordered | refused | absent, causal | absent "
          "| missing |\n" + "|---" * 8 + "|")
    for k in (1, 2, 4, 8):
        pairs = recall_items(n, seed, k)
        known, missing = [x for x, _ in pairs], [m for _, m in pairs if m]
        gone = unknowable(known)
        print("|", k, "|", " | ".join([
            score(known, independent=False), score(known), score(known, chunks=shuffled),
            score([dict(x, answer=corpus.DUNNO) for x in known]),
            score(gone, chunks=without, independent=False), score(gone, chunks=without),
            score(missing)]), "|", flush=True)
        by, misses = {}, []
        for x, ok in zip(known, exact(net, folder, known)):
            by.setdefault(x["kind"].split("/")[0], []).append(ok)
            misses += [] if ok else [(x["kind"], x["question"], x["answer"])]
        print("<!--", {a: f"{rate(b):.2f} of {len(b)}" for a, b in by.items()}, misses[:6], "-->")


def tasks(net, folder, n, seed):
    stale = stale_items(n, seed)
    print(f"stale answer refused: {100 * rate(exact(net, folder, stale)):.1f} % of {len(stale)}")
    items = dialogue_items(n, seed)
    for task in ("conversation", "summary", "json"):
        some = [x for x in items if x["task"] == task]
        right = exact(net, folder, some)
        print(f"{task}: exact {100 * rate(right):.1f} % of {len(some)}")
        if task == "json":
            valid = [ok or parses(generate(net, folder, parts_of(x, x["chunks"], True)[:-1]))
                     for x, ok in zip(some, right)]
            print(f"json: parses with the right fields {100 * rate(valid):.1f} %")


def parses(text):
    try:
        value = json.loads(text.strip())
    except ValueError:
        return False
    return isinstance(value, dict) and set(value) == set(FIELDS) and all(
        isinstance(value[k], t) for k, t in FIELDS.items())


def write(path, seed):
    items = []
    for k in (1, 2, 4, 8):
        pairs = recall_items(60, seed, k)
        items += [x for x, _ in pairs] + [m for _, m in pairs if m][:30]
    items += stale_items(40, seed) + dialogue_items(60, seed)
    with open(path, "w") as f:
        f.writelines(json.dumps(x, ensure_ascii=False) + "\n" for x in items)


def chat(net, folder, files):
    chunks = []
    for path in files:
        with open(path) as f:
            chunks.append(dict(kind="file", name=os.path.basename(path), content=f.read()))
    for line in sys.stdin:
        x = dict(system=None, turns=[], question=line.strip(), answer="")
        print(line.strip(), "->", generate(net, folder, parts_of(x, chunks, True)[:-1]))


def main():
    args = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("folder")
    args.add_argument("--n", type=int, default=100)
    args.add_argument("--seed", default="test")
    args.add_argument("--write")
    args.add_argument("--chat", nargs="+")
    a = args.parse_args()
    if a.write:
        return write(a.write, a.seed)
    net = model.load(a.folder)
    if a.chat:
        return chat(net, a.folder, a.chat)
    table(net, a.folder, a.n, a.seed)
    tasks(net, a.folder, a.n, a.seed)


if __name__ == "__main__":
    main()
