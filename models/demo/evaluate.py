"""Exact match on items held out by seed, as PyTorch computes it.

    python evaluate.py FOLDER [--n 100] [--seed dev]   recall by number of chunks, other tasks
    python evaluate.py --write eval.jsonl              the items that `strand bench recall` runs

Answers are canonical, so teacher-forced argmax over a whole answer equals exact greedy decoding.
"""

import argparse
import json

import torch
from tokenizers import Tokenizer

import corpus
import model
from packing import encode


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


def parts_of(x, independent, sink):
    """The parts of an item as `corpus.Generator` makes those of a sample."""
    parts = [(corpus.BOS, 0, 1, 0)] if sink else []
    for i, c in enumerate(x["chunks"], 1):
        text = corpus.render(dict(c, body=c["content"]))
        parts.append((text, i, 1 << i | 1 if independent else -1, 0))
    if x["system"]:
        parts.append((f"<|im_start|>system\n{x['system']}<|im_end|>\n", 20, -1, 0))
    for t in x["turns"]:
        parts += corpus.turn(t["user"], t["assistant"], 21, -1, weight=0)
    return parts + corpus.turn(x["question"], x["answer"], 21, -1)[:2]


@torch.no_grad()
def exact(net, folder, items, independent=True, batch=8):
    """The share of the items of whose answers every token is the argmax, in percent."""
    tok, right = Tokenizer.from_file(folder + "/tokenizer.json"), 0
    sink = net.config["bos_token_id"] is not None
    rows = [encode(tok, parts_of(x, independent, sink)) for x in items]
    rows.sort(key=lambda r: r.shape[1])
    for at in range(0, len(rows), batch):
        some = rows[at:at + batch]
        x = torch.zeros(5, len(some), some[-1].shape[1], dtype=torch.int32)
        for j, r in enumerate(some):
            x[:4, j, :r.shape[1]], x[4, j, :r.shape[1]] = r, 1
        hidden = net(x[0], model.mask(x[4], x[1], x[2], torch.bfloat16), torch.bfloat16)
        for j in range(len(some)):
            w = x[3, j].nonzero()[:, 0]
            right += int((net.logits(hidden[j, w - 1]).argmax(-1) == x[0, j, w]).all())
    return f"{100 * right / max(1, len(items)):.1f}"


def without(x):
    """The item without the chunk that holds its answer, which then is not known."""
    chunks = [c for i, c in enumerate(x["chunks"]) if i != x["answer_chunk"]]
    return dict(x, chunks=chunks, answer=corpus.DUNNO)


def table(net, folder, n, seed):
    print("| chunks | causal | independent | reversed | refused | absent | missing |\n"
          + "|---" * 7 + "|")
    for k in (1, 2, 4, 8):
        pairs = recall_items(n, seed, k)
        known = [x for x, _ in pairs]
        cells = [exact(net, folder, known, independent=False)] + [exact(net, folder, x) for x in (
            known, [dict(x, chunks=x["chunks"][::-1]) for x in known],
            [dict(x, answer=corpus.DUNNO) for x in known],
            # who one is has an answer without a chunk
            [without(x) for x in known if x["kind"] != "persona/name"],
            [m for _, m in pairs if m])]
        print("|", k, "|", " | ".join(cells), "|", flush=True)
    items = stale_items(n, seed) + dialogue_items(n, seed)
    for task in ("stale", "conversation", "summary", "json"):
        some = [x for x in items if x["task"] == task]
        print(f"{task}: {exact(net, folder, some)} % of {len(some)}", flush=True)


def write(path, seed):
    items = []
    for k in (1, 2, 4, 8):
        pairs = recall_items(60, seed, k)
        items += [x for x, _ in pairs] + [m for _, m in pairs if m][:30]
    items += stale_items(40, seed) + dialogue_items(60, seed)
    with open(path, "w") as f:
        f.writelines(json.dumps(x, ensure_ascii=False) + "\n" for x in items)


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("folder", nargs="?")
    args.add_argument("--n", type=int, default=100)
    args.add_argument("--seed", default="dev")
    args.add_argument("--write")
    a = args.parse_args()
    if a.write:
        write(a.write, "test")
    else:
        table(model.load(a.folder), a.folder, a.n, a.seed)
