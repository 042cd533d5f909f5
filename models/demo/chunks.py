"""Facts and the chunks that state them: notes, letters, settings, code, stock lists, memories,
personas. Each chunk knows what can be asked about it and what it nearly, but not quite, says."""

from functools import partial

from values import HERE, Values, article, plural

# facts.txt: entity kind / attribute / value / statements / questions / answer, with {e} entity,
# {a} attribute, {v} value, {n} value with its article. Most attributes also have generic forms.
SPEC = {}
with open(HERE + "/facts.txt") as lines:
    for line in lines:
        kind, attribute, value, *rest = line.strip("\n").split("/")
        rest = [[x for x in part.split("|") if x] for part in rest]
        SPEC.setdefault(kind, {})[attribute] = value, *rest


def capital(s):
    """Capitalises a sentence that starts with a word of ours; names keep their spelling."""
    return s[0].upper() + s[1:] if s.split(" ")[0] in ("the", "we") else s


def phrase(template, e, a, v):
    return capital(template.format(e=e, a=a, v=v, n=article(v)))


def fact(e, a, v, says, asks, line=None):
    """One fact: sentences that state it, [(question, answer)], and its line in a list."""
    fill = partial(phrase, e=e, a=a, v=v)
    return dict(e=e, a=a, v=v, says=[fill(x) for x in says], line=line or f"{a}: {v}",
                asks=[(fill(q), fill(x)) for q, x in asks])


class Chunks(Values):
    """`facts` is the inclusive range of facts per chunk. A chunk is a dict of kind, name, body,
    facts, missing: facts of the same sort that it does not hold."""

    def __init__(self, seed, facts):
        super().__init__(seed)
        self.facts = facts

    def entity(self, kind):
        def draw():
            if kind == "person": return self.value("person")
            if kind == "day": return self.value("name")
            if kind == "place": return self.value("place")
            if kind == "object":
                who = self.value("name")
                return self.pick((f"the {self.value('thing')}", f"the {self.value('thing')}",
                                  f"the {who} {self.word('noun')}", f"{who}'s {self.word('noun')}",
                                  f"the {self.word('noun')}"))
            if kind == "project":
                s = self.syllables(2, 3)
                return self.pick((s, f"{s}-{self.word('noun')}", s.capitalize(),
                                  f"{self.common()}-{self.word('noun')}"))
            head = self.pick("festival meeting wedding race auction concert trial party "
                             "conference workshop exam launch".split())
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
        kinds = dict(password="secret", code="secret", key="secret", token="secret", pin="number",
                     port="port", email="email", host="host", url="url", path="path", date="date",
                     time="time", color="colour", colour="colour", city="city", address="host",
                     phone="phone", budget="money", price="money", deadline="date", model="serial",
                     version="version", language="language", limit="number", count="number")
        value = kinds.get(head, "any") if self.chance(0.85) else "any"
        first = self.pick((self.word("about"), self.word("about"), self.common(), ""))
        if first == head:
            first = ""
        if self.chance(0.15):
            head = self.word("noun")
        return f"{first} {head}".strip(), value

    def plain(self, mine=False):
        """`The wifi password is x.`, `Anna's badge number is 7.`, `My ...`: a newcomer's facts."""
        if not mine and self.chance(0.15):
            first = self.pick((self.word("about"), self.common(), ""))
            role = self.fresh(lambda: f"{first} {self.word('role')}".strip())
            v = self.value("person")
            the, asks = "The {a} is {v}.", ("Who is the {a}?", "Who is our {a}?",
                                            "What is the name of the {a}?")
            return fact(role, role, v, [the, "{v} is the {a}.", "Our {a} is {v}."],
                        [(q, the) for q in asks])
        kinds = {}

        def draw():
            a, kind = self.topic()
            kinds[a] = kind
            return a

        a = self.fresh(draw)
        v = self.value(kinds[a])
        if mine:
            return fact("my", a, v, ["My {a} is {v}."], [("What is my {a}?", "Your {a} is {v}."),
                                                         ("Tell me my {a}.", "Your {a} is {v}.")])
        line = a if self.chance(0.5) else a[0].upper() + a[1:]
        line += self.pick((": ", ": ", " = ", " is ")) + v
        if self.chance(0.25):
            e = self.value("name")
            return fact(e, a, v, ["{e}'s {a} is {v}.", "The {a} of {e} is {v}."],
                        [("What is {e}'s {a}?", "{e}'s {a} is {v}."),
                         ("What is the {a} of {e}?", "The {a} of {e} is {v}.")], f"{e}'s {line}")
        the = "The {a} is {v}."
        asks = ["What is the {a}?"] * 3 + ["What's the {a}?", "Tell me the {a}.",
                                           "Do you know the {a}?", "Which {a} do we use?"]
        return fact(a, a, v, [the, the, "Our {a} is {v}.", "Remember: the {a} is {v}."],
                    [(q, the) for q in asks], line)

    def chunk(self):
        make = self.pick([self.notes] * 4 + [self.plain_notes] * 4 + [self.config] * 4 + [
            self.letter, self.readme, self.code, self.inventory, self.memory, self.memory])
        c = make()
        if self.chance(0.5):
            c["body"] += "\n"
        return c

    def pack(self, kind, name, body, facts, missing):
        return dict(kind=kind, name=name, body=body, facts=facts, missing=missing)

    def file(self, *endings):
        name = f"{self.common()}{self.pick(('', '', '_' + self.common()))}"
        folder = self.pick(("", "", "", "docs/", "src/", self.common() + "/"))
        return f"{folder}{name}.{self.pick(endings)}"

    def facts_about(self, kinds, n):
        facts, missing = [], []
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
        kinds = "person place object project event".split()
        facts, missing = self.facts_about(kinds, self.some(self.facts))
        style, last, lines = self.some((0, 4)), None, []
        if style == 0:
            for f in facts:
                if f["e"] != last:
                    lines.append("## " + f["e"])
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
            missing.append(fact(a, a, "", [], [(ask, "")]))
        style = self.some((0, 2))
        if style or mine:
            body = self.prose(facts)
        else:
            body = "\n".join(self.pick(("", "- ")) + f["line"] for f in facts)
        note = mine or self.chance(0.2)
        name = self.common() if note else self.file("md", "txt", "txt", "notes")
        return self.pack("note" if note else "file", name, body, facts, missing)

    def letter(self):
        kinds = "person place object event".split()
        facts, missing = self.facts_about(kinds, self.some(self.facts))
        a, b = self.entity("day"), self.entity("day")
        says = f"{b} wrote to {a}."
        facts.append(fact(a, "writer", b, [says], [(f"Who wrote to {a}?", says)]))
        body = f"Dear {a},\n{self.prose(facts[:-1])}\nYours, {b}"
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
        strings = "secret host url path email seconds name".split()
        kind = self.pick("number number number port secret host url path float flag email "
                         "seconds name".split())
        v = self.value(kind)
        forms = ["What is {e}?"] * 3 + ["What is the value of {e}?", "What's {e}?",
                                       "What is {e} set to?", "Tell me {e}.",
                                       "What does {e} equal?", "{e}?"]
        asks = [(q, "{e} is {v}.") for q in forms]
        return lambda v: fact(name, name, v, [], asks), v, f'"{v}"' if kind in strings else v

    def config(self):
        style = self.pick("py py py rs js env env toml yaml json h ini".split())
        form = dict(py="{k} = {v}", rs="const {k}: {t} = {v};", js="const {k} = {v};",
                    env="{k}={v}", toml="{k} = {v}", yaml="{k}: {v}", json='  "{k}": {v},',
                    h="#define {k} {v}", ini="{k} = {v}")[style]
        upper = style in ("py", "rs", "js", "env", "h")
        lines, facts = [], []
        if self.chance(0.25):
            tops = dict(py=("import os", "# settings"), rs=("//! Settings.", "use std::env;"),
                        json=("{",))
            lines.append(self.pick(tops.get(style, ("# settings",))))
        for _ in range(self.some(self.facts)):
            make, bare, quoted = self.constant(upper)
            v = bare if style in ("env", "yaml", "ini") else quoted
            f = make(v)
            t = "&str" if v[0] == '"' else self.pick(("u32", "usize", "f64", "i64"))
            mark, note = "//" if style in ("rs", "js", "h") else "#", ""
            if self.chance(0.08) and style in ("py", "rs", "js", "h", "yaml"):
                note = f"  {mark} {self.common()}"
            lines.append(form.format(k=f["e"], v=v, t=t) + note)
            facts.append(f)
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
            missing.append(fact(near, near, "", [], [("What is {e}?", "")]))
        name = ".env" if style == "env" and self.chance(0.5) else self.file(style)
        return self.pack("file", name, "\n".join(lines), facts, missing)

    def code(self):
        def function():
            n = self.fresh(lambda: f"{self.word('verb')}_{self.common()}")
            doc, x = self.value("goal"), self.pick("abnxk")
            v = f"{x} {self.pick('+-*')} {self.digits(1, 2)}"
            lines.append(f'def {n}({x}):\n    """{doc.capitalize()}."""\n    return {v}')
            does = [(q, "{e} will {v}.") for q in ("What does {e} do?", "What is {e} for?")]
            returns = [("What does {e} return?", "{e} returns {v}.")]
            return self.pick((fact(n, "doc", doc, [], does), fact(n, "result", v, [], returns)))

        lines, facts = [], []
        for _ in range(self.some(self.facts)):
            if self.chance(0.5):
                make, _, v = self.constant(True)
                facts.append(make(v))
                lines.append(f"{facts[-1]['e']} = {v}")
            else:
                facts.append(function())
        body = self.pick(("\n", "\n\n")).join(lines)
        missing = self.file("py"), [function(), self.constant(True)[0]("")]
        return self.pack("file", missing[0], body, facts, missing[1])

    def inventory(self):
        def item():
            t = self.fresh(lambda: plural(self.value("thing")))
            n, s = self.digits(1, 3), self.pick("ABCDEFGH") + self.digits(1, 2)
            many = [(q, "There are {v} {e}.") for q in
                    ("How many {e} are there?", "How many {e} do we have?")]
            where = [(q, "The {e} are on shelf {v}.") for q in
                     ("Where are the {e}?", "On which shelf are the {e}?")]
            return (f"- {n} {t} (shelf {s})", fact(t, "count", n, [], many),
                    fact(t, "shelf", s, [], where))

        items = [item() for _ in range(self.some(self.facts))]
        body = "Stock:\n" + "\n".join(x for x, *_ in items)
        return self.pack("file", self.file("txt", "md"), body,
                         [f for _, *both in items for f in both], list(item()[1:]))

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
