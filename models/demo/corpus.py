"""Writes the training text: context chunks, questions whose answers stand only in a chunk, chat in
persona, and JSON analyses. Deterministic by seed; every word comes from words.txt or is invented.

A sample is a list of parts `(text, block, sees, weight)`. A part is one run of tokens: block 0 is
BOS (variant mixed-sink), 1.. are chunks, then the header, then turns; `sees` is the bit set of
blocks its tokens may attend to (-1: all before it) and weight 1 marks an answer to learn.
"""

import json

from chunks import MIX, SPEC, Chunks
from values import WORDS, article

DUNNO = "I don't know."
BOS = "<|endoftext|>"
TASK_JSON = "Analyse the conversation as JSON."
TASK_SUMMARY = "Summarise the conversation in one sentence."
SMALL_TALK = (("Thanks!", "You are welcome."), ("Thank you.", "You are welcome."),
              ("Bye.", "Goodbye!"), ("What can you do?", "I answer from the active context."),
              ("Hello!", None), ("Hi", None))     # None: a greeting, which depends on the persona
HEADERS = ("You are a {a} {j}.|Answer from the {n} only.|Today is {d}. Be {a}."
           "|Answer in one short sentence.|You work for {n}. Use the files.")
HELLO = "Hello!|Hi!|Hey.|Hi|Hello|Greetings!|Good morning."
FRIENDLY = "You are very kind.|I like you.|You are a good friend.", "That is kind of you."
RUDE = "You are a fool.|I hate you.|Go away!|You are useless.", "Do not speak to me like that."
# what a visitor tells of himself: value, ways to say it, the character's reply
TELLS = dict(name=("name", "My name is {v}.|I am {v}.|Call me {v}.", "Nice to meet you, {v}."),
             job=("job", "I work as {n}.|I am {n}.", "So you are {n}."),
             home=("place", "I come from {v}.|I live in {v}.", "I have never been to {v}."),
             gift=("thing", "I brought you {n}.|This {v} is for you.", "Thank you for the {v}!"))
NOBODY = (("Who are you?", "I am a small demo assistant."), ("How old are you?", DUNNO),
          ("What do you want?", DUNNO))
RECALLS = dict(name="What is my name?", job="What is my job?", home="Where do I live?")


class Generator(Chunks):
    """`facts` and `chunks` are inclusive ranges; `drill` is the share of plain copy exercises."""

    def __init__(self, seed, facts=(2, 6), chunks=(1, 4), drill=0.0, mix=MIX, independent=0.5,
                 sink=False):
        super().__init__(seed, facts, mix)
        self.chunks, self.drill, self.independent, self.sink = chunks, drill, independent, sink

    def sample(self):
        if self.chance(self.drill):
            return self.drill_sample()
        return self.npc_sample() if self.chance(0.15) else self.qa_sample()

    def drill_sample(self):
        parts = [(BOS, 0, 1, 0)] if self.sink else []
        for i in range(self.some((1, 4))):
            x = " ".join(self.value(self.pick(("thing", "name", "number", "secret", "place")))
                         for _ in range(self.some((2, 8))))
            parts += turn(self.pick(("Repeat: ", "Say: ")) + x, x, 1, -1)
        return parts

    def system(self):
        """The header: sometimes absent, sometimes a sentence the model has not seen."""
        x = self.dice.random()
        if x < 0.5: return None
        if x < 0.7: return "You answer from the active context."
        if x < 0.85: return "You are a helpful assistant."
        return self.either(HEADERS).format(a=self.word("adj"), j=self.word("job"), n=self.common(),
                                           d=self.value("date"))

    def layout(self, chunks, header):
        """BOS if the variant has one, the chunks, the header: the parts, and the next block."""
        independent = self.chance(self.independent)
        parts = [(BOS, 0, 1, 0)] if self.sink else []
        for i, c in enumerate(chunks, 1):
            parts.append((render(c), i, 1 << i | 1 if independent else -1, 0))
        if header:
            parts.append((f"<|im_start|>system\n{header}<|im_end|>\n", len(chunks) + 1, -1, 0))
        return parts, len(chunks) + 2

    def ask(self, f, known=True):
        q, a = self.pick(f["asks"])
        return (self.loose(q), a if known else DUNNO)

    def loose(self, q):
        """As people type: now and then no capital, no question mark, a polite word."""
        x = self.dice.random()
        if x < 0.03: return q.rstrip("?")
        if x < 0.06:
            plain = q.split()[0] in ("What", "Where", "Who", "How", "When")
            return q[0].lower() + q[1:] if plain else q
        if x < 0.08: return "Please tell me: " + q
        return q

    def question(self, on, off):
        """One live question over the active chunks; `off` are chunks the model must not know."""
        x = self.dice.random()
        if x < 0.62 and on:
            return self.ask(self.pick(self.pick(on)["facts"]))
        if x < 0.65 and on:
            c = self.pick(on)
            said = [self.pick(f["says"]) if f["says"] else f["asks"][0][1] for f in c["facts"][:4]]
            short = len(c["facts"]) <= 4 and c["kind"] != "persona"
            if short and all(s in c["body"] for s in said):
                q = self.either("List the facts in {name}.|What is in {name}?").format(**c)
                return q, "\n".join("- " + s for s in said)
        if x < 0.69 and on:
            c = self.pick(on)
            f = self.pick(c["facts"])
            if f["e"] not in ("you", "my", "guest"):
                q = self.either("Where can I read about {e}?|Which file mentions {e}?")
                return q.format(**f), f"See {c['name']}."
        if x < 0.72:
            return self.pick(SMALL_TALK)
        missing = [f for c in on for f in c["missing"]]
        absent = [f for c in off for f in c["facts"]]
        f = self.pick(self.pick([m for m in (missing, missing, absent) if m]))
        return self.ask(f, known=False)

    def qa_sample(self):
        chunks = [self.chunk() for _ in range(self.some(self.chunks))]
        if self.chance(0.12):
            chunks[self.dice.randrange(len(chunks))] = self.persona()
        off = [self.chunk()]
        persona = next((c for c in chunks if c["kind"] == "persona"), None)
        parts, block = self.layout(chunks, self.system())
        if self.chance(0.6):     # every question alone: many answers for one reading of the chunks
            base = (1 << block) - 1
            for i in range(block, min(31, block + self.some((4, 10 + len(chunks))))):
                q, a = self.question(chunks, off)
                parts += turn(q, a or greeting(persona), i, base | 1 << i)
            return parts
        again = []
        for _ in range(self.some((1, 3)) if self.chance(0.5) else 0):
            # Spoken under another set of chunks: what the answers said then must not be used now.
            c = self.pick(off * len(chunks) + chunks)
            f = self.pick(c["facts"])
            q, a = self.ask(f, known=c in off)
            again.append((f, c in chunks))
            parts += turn(q, a, block, -1, weight=0)
        for _ in range(self.some((2, 7))):
            if again and self.chance(0.5):
                q, a = self.ask(*self.pick(again))
            else:
                q, a = self.question(chunks, off)
            parts += turn(q, a or greeting(persona), block, -1)
        return parts

    def npc_sample(self):
        p = self.persona() if self.chance(0.85) else None
        n = self.some((0, max(0, self.chunks[1] - 1))) if self.chance(0.5) else 0
        chunks = ([p] if p else []) + [self.memory() for _ in range(n)]
        self.dice.shuffle(chunks)
        speak = "You are {who}.|Stay in character.|Speak as {who}."
        header = self.either(speak).format(**p) if p and self.chance(0.3) else None
        parts, block = self.layout(chunks, header)
        turns, end = self.dialogue(p, chunks)
        for q, a in turns:
            parts += turn(q, a, block, -1)
        if self.chance(0.7):
            parts += turn(*end, block, -1)
        return parts

    def remark(self, chunks, me):
        """A question about the chunks in the middle of a dialogue; `me`: what the visitor told."""
        if not chunks:
            return self.pick(NOBODY)
        c = self.pick(chunks)
        known = self.chance(0.75) or not c["missing"]
        f = self.pick(c["facts"] if known else c["missing"])
        if f["e"] == "guest" and f["a"] in me:
            return self.ask(dict(f, asks=[(q, recalled(f["a"], me)) for q, _ in f["asks"]]))
        return self.ask(f, known)

    def dialogue(self, p, chunks):
        """Turns of a visitor with a character, and the closing task with its answer."""
        me, said, tone, turns = {}, [], self.pick((-1, 0, 0, 1)), []
        for c in chunks:
            me |= c.get("guest", {})
        shown = False
        for i in range(self.some((2, 6))):
            x = self.dice.random()
            if i == 0 and self.chance(0.6):
                turns.append((self.either(HELLO), greeting(p)))
            elif x < 0.3:
                turns.append(self.remark(chunks, me))
            elif x < 0.65:
                k = self.pick([k for k in TELLS if k not in me] or ["gift"])
                if k == "gift" and (tone < 0 or k in me):
                    continue
                kind, says, a = TELLS[k]
                v = me[k] = self.value(kind)
                said.append(k)
                tone = 1 if k == "gift" else tone
                turns.append(tuple(t.format(v=v, n=article(v)) for t in (self.either(says), a)))
            elif x < 0.82 and tone:
                shown = True
                says, a = FRIENDLY if tone > 0 else RUDE
                turns.append((self.either(says), a))
            else:
                k = self.pick(tuple(RECALLS))
                turns.append((RECALLS[k], recalled(k, me) if k in me else DUNNO))
        tone = tone if shown or "gift" in said else 0
        mood = "happy" if tone > 0 else "angry" if tone < 0 else p["mood"] if p else "calm"
        who = me["name"] if "name" in said else "The visitor"
        summary = f"{who} was {('rude', 'neutral', 'friendly')[tone + 1]}" + (
            f" and brought {article(me['gift'])}." if "gift" in said else ".")
        if self.chance(0.25):
            return turns, (self.pick((TASK_SUMMARY, "Summarise the conversation.")), summary)
        facts = [f"{k}: {me[k]}" for k in TELLS if k in said]
        task = self.pick((TASK_JSON, TASK_JSON, "Analyze the conversation as JSON.",
                          "Analyse this conversation. Answer in JSON."))
        answer = dict(summary=summary, facts=facts, relationship=tone, mood=mood)
        return turns, (task, json.dumps(answer, ensure_ascii=False))

    def either(self, options):
        return self.dice.choice(options.split("|"))


def recalled(k, me):
    return SPEC["guest"][k][3][0].format(v=me[k], n=article(me[k]))


def greeting(persona):
    if not persona:
        return "Hello! How can I help you?"
    m, n = persona["mood"], persona["who"]
    return f"Hello, my friend! I am {n}." if m in WORDS["good"] else \
        f"What do you want? I am {n}." if m in WORDS["bad"] else f"Good day. I am {n}."


def render(c):
    return f"<|im_start|>system\n# {c['kind']}: {c['name']}\n{c['body']}<|im_end|>\n"


def turn(q, a, block, sees, weight=1):
    return [(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", block, sees, 0),
            (f"{a}<|im_end|>", block, sees, weight), ("\n", block, sees, 0)]
