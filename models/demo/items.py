"""The items of the evaluation, held out by seed; `strand bench recall` runs them.

    python items.py eval.jsonl                          those that are shipped
    python items.py dev.jsonl --seed dev --n 200        other items, 200 a row
"""

import argparse
import json

import corpus


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


def write(path, seed, n):
    items = []
    for k in (1, 2, 4, 8):
        pairs = recall_items(n, seed, k)
        items += [x for x, _ in pairs] + [m for _, m in pairs if m][:n // 2]
    items += stale_items(n * 2 // 3, seed) + dialogue_items(n, seed)
    with open(path, "w") as f:
        f.writelines(json.dumps(x, ensure_ascii=False) + "\n" for x in items)


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("path")
    args.add_argument("--seed", default="test")
    args.add_argument("--n", type=int, default=60, help="items of recall by number of chunks")
    a = args.parse_args()
    write(a.path, a.seed, a.n)
