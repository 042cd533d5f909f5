"""Facts and the chunks that state them: notes, letters, settings, code, stock lists, memories,
personas. Each chunk knows what can be asked about it and what it nearly, but not quite, says."""

from functools import partial

from values import HERE, WORDS, Values, article, plural

# how many of the chunks are of which kind, and the mix that dwells on what is learnt last: values
# that stand before the word one asks for
MIX = dict(notes=4, plain_notes=4, config=4, letter=1, readme=1, code=1, inventory=1, memory=2)
HARD = dict(notes=5, plain_notes=2, owned_notes=2, config=3, letter=2, readme=2, code=2, inventory=4,
            memory=1)
# facts.txt: entity kind / attribute / value / statements / questions / answer, with {e} entity,
# {a} attribute, {v} value, {n} value with its article. Most attributes also have generic forms.
SPEC = {}
with open(HERE + "/facts.txt") as lines:
    for line in lines:
        kind, attribute, value, *rest = line.strip("\n").split("/")
        rest = [[x for x in part.split("|") if x] for part in rest]
        SPEC.setdefault(kind, {})[attribute] = value, *rest
TOPICS = dict(pair.split("=") for pair in WORDS["topic"])       # the kind of value a topic has
# settings: a file's ending -> how it writes a constant, its comment mark, first lines
STYLES = dict(py=("{k} = {v}", "#", "import os", "# settings"), env=("{k}={v}", ""),
              rs=("const {k}: {t} = {v};", "//", "//! Settings.", "use std::env;"),
              js=("const {k} = {v};", "//"), toml=("{k} = {v}", ""), yaml=("{k}: {v}", "#"),
              json=('  "{k}": {v},', "", "{"), h=("#define {k} {v}", "//"), ini=("{k} = {v}", ""))


def phrase(template, e, a, v):
    """Capitalises a sentence that starts with a word of ours; names keep their spelling."""
    s = template.format(e=e, a=a, v=v, n=article(v))
    return s[0].upper() + s[1:] if s.split(" ")[0] in ("the", "we") else s


def fact(e, a, v, says, asks, answer=None, line=None):
    """One fact: sentences that state it, [(question, answer)], and its line in a list. `asks` are
    such pairs, or questions that all have `answer`."""
    fill = partial(phrase, e=e, a=a, v=v)
    asks = [(q, answer) for q in asks] if answer is not None else asks
    return dict(e=e, a=a, v=v, says=[fill(x) for x in says], line=line or f"{a}: {v}",
                asks=[(fill(q), fill(x)) for q, x in asks])


class Chunks(Values):
    """`facts` is the inclusive range of facts per chunk. A chunk is a dict of kind, name, body,
    facts, missing: facts of the same sort that it does not hold."""

    def __init__(self, seed, facts, mix=MIX):
        super().__init__(seed)
        self.facts = facts
        self.kinds = [getattr(self, kind) for kind, share in mix.items() for _ in range(share)]

    def entity(self, kind):
        def draw():
            if kind in ("person", "place"): return self.value(kind)
            if kind == "day": return self.value("name")
            if kind == "object":
                who = self.value("name")
                return self.pick((f"the {self.value('thing')}", f"the {self.value('thing')}",
                                  f"the {who} {self.word('noun')}", f"{who}'s {self.word('noun')}",
                                  f"the {self.word('noun')}"))
            if kind == "project":
                s = self.syllables(2, 3)
                return self.pick((s, f"{s}-{self.word('noun')}", s.capitalize(),
                                  f"{self.common()}-{self.word('noun')}"))
            head = self.word("event")
            return f"the {self.pick((self.value('name'), self.common()))} {head}"
        return self.fresh(draw)

    def about(self, kind, e, a):
        value, says, asks, answer = SPEC[kind][a]
        v = self.value(value)
        asks = [(q, answer[0]) for q in asks]
        if kind in ("me", "day", "guest"):
            return fact(e, a, v, says, asks)
        of, own = "The {a} of {e} is {v}.", "{e}'s {a} is {v}."
        generic = [("What is the {a} of {e}?", of), ("Tell me the {a} of {e}.", of)]
        if "'s " not in e:
            generic.append(("What is {e}'s {a}?", own))
        return fact(e, a, v, says * 2 + [of, own], asks * 2 + generic)

    def topic(self):
        """A noun phrase that can have a value, and the value's kind: open vocabulary on purpose."""
        head = self.word("thing")
        value = TOPICS.get(head, "any") if self.chance(0.85) else "any"
        first = self.pick((self.word("about"), self.word("about"), self.common(), ""))
        if first == head:
            first = ""
        if self.chance(0.15):
            head = self.word("noun")
        return f"{first} {head}".strip(), value

    def plain(self, mine=False, owner=""):
        """`The wifi password is x.`, `Anna's badge number is 7.`, `My ...`: a newcomer's facts."""
        the = "The {a} is {v}."
        if not mine and not owner and self.chance(0.15):
            first = self.pick((self.word("about"), self.common(), ""))
            role = self.fresh(lambda: f"{first} {self.word('role')}".strip())
            asks = "Who is the {a}?", "Who is our {a}?", "What is the name of the {a}?"
            return fact(role, role, self.value("person"),
                        [the, "{v} is the {a}.", "Our {a} is {v}."], asks, the)
        while (topic := self.topic())[0] in self.used:
            pass
        a, v = topic[0], self.value(topic[1])
        self.used.add(a)
        if mine:
            return fact("my", a, v, ["My {a} is {v}."], ("What is my {a}?", "Tell me my {a}."),
                        "Your {a} is {v}.")
        line = a if self.chance(0.5) else a[0].upper() + a[1:]
        line += self.pick((": ", ": ", " = ", " is ")) + v
        if owner or self.chance(0.25):
            e, of, own = owner or self.value("name"), "The {a} of {e} is {v}.", "{e}'s {a} is {v}."
            asks = ("What is {e}'s {a}?", own), ("What is the {a} of {e}?", of)
            return fact(e, a, v, [own, of], asks[bool(owner):], None, f"{e}'s {line}")
        asks = ["What is the {a}?"] * 3 + ["What's the {a}?", "Tell me the {a}.",
                                           "Do you know the {a}?", "Which {a} do we use?"]
        return fact(a, a, v, [the, the, "Our {a} is {v}.", "Remember: the {a} is {v}."], asks, the,
                    line)

    def chunk(self):
        c = self.pick(self.kinds)()
        if self.chance(0.5):
            c["body"] += "\n"
        return c

    def pack(self, kind, name, body, facts, missing):
        return dict(kind=kind, name=name, body=body, facts=facts, missing=missing)

    def file(self, *endings):
        name = f"{self.common()}{self.pick(('', '', '_' + self.common()))}"
        folder = self.pick(("", "", "", "docs/", "src/", self.common() + "/"))
        return f"{folder}{name}.{self.pick(endings)}"

    def facts_about(self, *kinds):
        n, facts, missing = self.some(self.facts), [], []
        while len(facts) < n:
            kind = self.pick(kinds)
            table = list(SPEC[kind])
            keys = self.dice.sample(table, min(n - len(facts), self.some((1, 4))))
            others = [k for k in table if k not in keys]
            for _ in range(self.pick((1, 1, 2, 3))):        # entities that share their attributes
                e = self.entity(kind)
                facts += [self.about(kind, e, a) for a in keys[:max(1, n - len(facts))]]
                missing += [self.about(kind, e, self.pick(others))]
                if len(facts) >= n:
                    break
            missing.append(self.about(kind, self.entity(kind), self.pick(keys)))
        return facts, missing

    def prose(self, facts):
        out = []
        for f in facts:
            out.append(self.pick(f["says"]))
            if self.chance(0.12):
                out.append(self.word("fill"))
        return self.pick((" ", "\n")).join(out)

    def notes(self):
        facts, missing = self.facts_about("person", "place", "object", "project", "event")
        style, last, lines = self.some((0, 4)), None, []
        if style == 0:
            for f in facts:
                lines += [] if f["e"] == last else ["## " + f["e"]]
                lines.append("- " + f["line"])
                last = f["e"]
        elif style == 1:
            lines = ["- " + self.pick(f["says"]) for f in facts]
        else:
            if self.chance(0.3):
                self.dice.shuffle(facts)
            lines = [self.prose(facts)]
        if self.chance(0.2):
            lines.insert(0, f"# {self.common().capitalize()} {self.common()}")
        return self.pack("file", self.file("md", "txt"), "\n".join(lines), facts, missing)

    def plain_notes(self):
        mine = self.chance(0.15)
        facts = [self.plain(mine) for _ in range(self.some(self.facts))]
        missing = [self.plain(mine) for _ in range(2)]
        ask = "What is my {a}?" if mine else "What is the {a}?"
        for head in [f["a"].split()[-1] for f in facts[:2]]:  # near misses: a word of a known topic
            a = self.fresh(lambda: f"{self.pick((self.word('about'), self.common()))} {head}")
            missing.append(fact(a, a, "", [], [ask], ""))
        if self.some((0, 2)) or mine:
            body = self.prose(facts)
        else:
            body = "\n".join(self.pick(("", "- ")) + f["line"] for f in facts)
        if mine or self.chance(0.2):
            return self.pack("note", self.common(), body, facts, missing)
        return self.pack("file", self.file("md", "txt", "txt", "notes"), body, facts, missing)

    def owned_notes(self):
        """`The password of the harbour gate is x.`: things that have one or two such topics each."""
        facts, missing = [], []
        while len(facts) < self.facts[1] and (not facts or self.chance(0.7)):
            e = self.entity("object")
            facts += [self.plain(owner=e) for _ in range(self.some((1, 2)))]
            missing.append(self.plain(owner=e))
        missing.append(self.plain(owner=self.entity("object")))
        return self.pack("file", self.file("md", "txt"), self.prose(facts), facts, missing)

    def letter(self):
        facts, missing = self.facts_about("person", "place", "object", "event")
        a, b = self.entity("day"), self.entity("day")
        says = f"{b} wrote to {a}."
        body = f"Dear {a},\n{self.prose(facts)}\nYours, {b}"
        facts.append(fact(a, "writer", b, [says], [f"Who wrote to {a}?"], says))
        return self.pack("file", "letter_" + self.file("txt"), body, facts, missing)

    def readme(self):
        e = self.entity("project")
        keys = self.dice.sample(list(SPEC["project"]), min(7, self.some(self.facts)))
        facts = [self.about("project", e, k) for k in keys]
        missing = [self.about("project", e, k) for k in SPEC["project"] if k not in keys][:2]
        body = self.prose(facts) if self.chance(0.5) else "\n".join("- " + f["line"] for f in facts)
        return self.pack("file", "README.md", f"# {e}\n{body}", facts, missing)

    def constant(self, upper):
        """A function from a value to its fact, the value, and the value as source code."""
        def draw():
            w, x = self.word, self.common
            return self.pick((f"{w('const')}_{w('const2')}", f"{w('const')}_{w('const2')}",
                              w("const2"), f"{x()}_{x()}", f"{self.syllables(2, 2)}_{x()}",
                              f"{w('const')}_{x()}_{w('const2')}"))

        name = self.fresh(lambda: draw().upper() if upper else draw().lower())
        kind = self.word("setting")
        v = self.value(kind)
        bare = kind in ("number", "port", "float", "flag")
        asks = ["What is {e}?"] * 3 + ["What is the value of {e}?", "What's {e}?",
                                       "What is {e} set to?", "Tell me {e}.",
                                       "What does {e} equal?", "{e}?"]
        return lambda v: fact(name, name, v, [], asks, "{e} is {v}."), v, v if bare else f'"{v}"'

    def config(self):
        style = self.pick("py py py rs js env env toml yaml json h ini".split())
        form, mark, *tops = STYLES[style]
        upper = style in ("py", "rs", "js", "env", "h")
        lines, facts = [], []
        if self.chance(0.25):
            lines.append(self.pick(tops or ["# settings"]))
        for _ in range(self.some(self.facts)):
            make, bare, quoted = self.constant(upper)
            v = bare if style in ("env", "yaml", "ini") else quoted
            facts.append(make(v))
            t = "&str" if v[0] == '"' else self.pick(("u32", "usize", "f64", "i64"))
            note = f"  {mark} {self.common()}" if self.chance(0.08) and mark else ""
            lines.append(form.format(k=facts[-1]["e"], v=v, t=t) + note)
            if self.chance(0.06):
                lines.append("")
        if style == "json":
            lines[-1] = lines[-1].rstrip(",")
            lines = ["{"] + [x for x in lines if x != "{"] + ["}"]
        missing = [self.constant(upper)[0]("") for _ in range(2)]
        if upper and "_" in facts[0]["e"]:       # a near miss: one word of a known constant
            head = facts[0]["e"].split("_")
            near = self.fresh(lambda: self.pick((head[0] + "_" + self.word("const2"),
                                                 self.word("const") + "_" + head[-1])))
            missing.append(fact(near, near, "", [], ["What is {e}?"], ""))
        name = ".env" if style == "env" and self.chance(0.5) else self.file(style)
        return self.pack("file", name, "\n".join(lines), facts, missing)

    def function(self):
        """The source of a function, and a fact about it."""
        n = self.fresh(lambda: f"{self.word('verb')}_{self.common()}")
        doc, x = self.value("goal"), self.pick("abnxk")
        v = f"{x} {self.pick('+-*')} {self.digits(1, 2)}"
        return f'def {n}({x}):\n    """{doc.capitalize()}."""\n    return {v}', self.pick((
            fact(n, "doc", doc, [], ("What does {e} do?", "What is {e} for?"), "{e} will {v}."),
            fact(n, "result", v, [], ["What does {e} return?"], "{e} returns {v}.")))

    def code(self):
        lines, facts = [], []
        for _ in range(self.some(self.facts)):
            if self.chance(0.5):
                make, _, v = self.constant(True)
                line, f = None, make(v)
                line = f"{f['e']} = {v}"
            else:
                line, f = self.function()
            lines.append(line)
            facts.append(f)
        body = self.pick(("\n", "\n\n")).join(lines)
        name = self.file("py")
        return self.pack("file", name, body, facts,
                         [self.function()[1], self.constant(True)[0]("")])

    def inventory(self):
        def item():
            t = self.fresh(lambda: plural(self.value("thing")))
            n, s = self.digits(1, 3), self.pick("ABCDEFGH") + self.digits(1, 2)
            lines.append(f"- {n} {t} (shelf {s})")
            return [fact(t, "count", n, [], ("How many {e} are there?", "How many {e} do we have?"),
                         "There are {v} {e}."),
                    fact(t, "shelf", s, [], ("Where are the {e}?", "On which shelf are the {e}?"),
                         "The {e} are on shelf {v}.")]

        lines = ["Stock:"]
        facts = [f for _ in range(self.some(self.facts)) for f in item()]
        body, name = "\n".join(lines), self.file("txt", "md")
        return self.pack("file", name, body, facts, item())

    def memory(self):
        keys = [self.pick(list(SPEC["day"])) for _ in range(self.some(self.facts))]
        facts = [self.about("day", self.entity("day"), k) for k in keys]
        missing = [self.about("day", self.entity("day"), self.pick(keys))]
        others = [k for k in SPEC["day"] if k != keys[0]]
        missing += [self.about("day", facts[0]["e"], self.pick(others))]
        guest = {}
        if self.chance(0.3) and "guest" not in self.used:
            self.used.add("guest")
            about = [self.about("guest", "guest", k) for k in SPEC["guest"]]
            known = self.dice.sample(about, self.some((1, 2)))
            guest = {f["a"]: f["v"] for f in known}
            facts = facts[:max(0, len(facts) - 1)] + known
            missing += [f for f in about if f not in known]
        name = self.pick((f"day {self.digits(1, 3)}", self.value("date"), f"{self.common()}"))
        return self.pack("memory", name, self.prose(facts), facts, missing) | dict(guest=guest)

    def persona(self):
        facts = {k: self.about("me", "you", k) for k in SPEC["me"]}
        rest = [k for k in facts if k not in ("name", "mood")]
        keys = ["name", "mood"] + self.dice.sample(rest, self.some((2, 5)))
        say = (lambda f: f["line"]) if self.chance(0.7) else lambda f: self.pick(f["says"])
        body = "\n".join(say(facts[k]) for k in keys)
        name = facts["name"]["v"]
        c = self.pack("persona", name, body, [facts[k] for k in keys],
                      [facts[k] for k in facts if k not in keys])
        return c | dict(mood=facts["mood"]["v"], who=name)
