"""Words, names, numbers and other values, drawn by seed. The words stand in words.txt; about half
of all names are invented, so that a reader has to copy and cannot guess."""

import os
import random

HERE = os.path.dirname(os.path.abspath(__file__))
WORDS = {}
with open(HERE + "/words.txt") as lines:
    for line in lines:
        key, _, rest = line.strip().partition(": ")
        WORDS[key] = rest.split("|") if "|" in rest else rest.split()


def article(value):
    return ("an " if value[:1].lower() in tuple("aeiou") else "a ") + value


def plural(s):
    return s + ("es" if s[-1] in "sx" or s[-2:] in ("ch", "sh") else "s")


class Values:
    """`used` keeps the names of one sample apart."""

    def __init__(self, seed):
        self.dice, self.used = random.Random(seed), set()

    def chance(self, p):
        return self.dice.random() < p

    def pick(self, options):
        return self.dice.choice(options)

    def word(self, key):
        return self.dice.choice(WORDS[key])

    def some(self, span):
        return self.dice.randint(*span)

    def syllables(self, low, high):
        return "".join(self.word("onset") + self.word("vowel")
                       + (self.word("coda") if self.chance(0.55) else "")
                       for _ in range(self.some((low, high))))

    def digits(self, low, high):
        n = self.some((low, high))
        return str(self.some((10 ** (n - 1), 10 ** n - 1)))

    def fresh(self, draw):
        """A name that nothing else in this sample has."""
        while (x := draw()) in self.used:
            pass
        self.used.add(x)
        return x

    def common(self):
        return self.word(self.pick(("noun", "adj", "animal", "noun", "thing", "food")))

    def value(self, kind):
        p, w = self.pick, self.word
        match kind:
            case "name":
                return w("first") if self.chance(0.4) else self.syllables(2, 3).capitalize()
            case "person":
                last = w("last") if self.chance(0.5) else self.value("name")
                return self.value("name") + (" " + last if self.chance(0.4) else "")
            case "place":
                if self.chance(0.25): return w("city")
                return self.value("name") + (" " + w("suffix") if self.chance(0.5) else "")
            case "thing": return f"{w('adj')} {w('noun')}"
            case "spot":
                room = p((f"room {self.digits(1, 3)}", "the " + w("room"), "the " + w("room")))
                return p((room, room, f"the {w('adj')} {w('noun')}"))
            case "pet": return f"{w('animal')} {self.value('name')}"
            case "goal": return f"{w('verb')} the {self.value('thing')}"
            case "mood": return w(p(("good", "bad", "calm")))
            case "age": return self.digits(2, 2)
            case "year": return self.digits(4, 4)
            case "number": return self.digits(1, 5)
            case "port": return self.digits(2, 5)
            case "seconds": return f"{self.digits(1, 3)} {p(('seconds', 'minutes', 'ms', 'days'))}"
            case "weight": return f"{self.digits(1, 3)} {p(('kg', 'g', 'tons', 'pounds'))}"
            case "money":
                n = self.digits(1, 4)
                return p((f"{n} coins", f"{n} euros", f"{n} dollars", f"${n}", f"{n} crowns"))
            case "phone": return p((self.digits(4, 6), f"{self.digits(3, 3)}-{self.digits(4, 4)}"))
            case "date":
                m, d, y = self.some((1, 12)), self.some((1, 28)), self.some((1950, 2039))
                name = WORDS["month"][m - 1]
                return p((f"{name} {d}", f"{name} {d}", f"{d} {name}", f"{y}-{m:02}-{d:02}",
                          f"{name} {d}, {y}", w("weekday")))
            case "time": return p((f"{self.some((0, 23))}:{self.some((0, 59)):02}",
                                   f"{self.some((1, 12))} {p(('am', 'pm'))}"))
            case "version": return f"{self.some((0, 9))}.{self.some((0, 20))}.{self.some((0, 9))}"
            case "serial": return p("ABCDEFGHKLMNPRSTVX") + self.digits(3, 5)
            case "secret":
                letters = "abcdefghjkmnpqrstuvwxyz23456789"
                mix = "".join(p(letters) for _ in range(self.some((4, 7))))
                a, b, n = self.common(), self.common(), self.digits(2, 4)
                return p((f"{a}-{b}", f"{a}{n}", f"{a}-{n}", mix, self.syllables(2, 3),
                          f"{a.upper()}-{n}", mix.upper(), f"{a}_{b}", f"{a}-{b}-{n}", a, n))
            case "email":
                who = p((self.value("name").lower(), self.common()))
                return f"{who}@{self.value('host')}"
            case "host":
                base = p((self.syllables(2, 2), self.common()))
                return p((f"{base}.com", f"{base}.org", f"{base}.{self.common()}.net",
                          "localhost", f"{base}.example.com",
                          f"10.0.{self.some((0, 255))}.{self.some((1, 254))}"))
            case "url": return f"http{p(('', 's'))}://{self.value('host')}/{self.common()}"
            case "path": return p((f"/{p(('etc', 'opt', 'srv', 'var', 'home'))}/{self.common()}/"
                                   f"{self.common()}", f"{self.common()}/{self.common()}.txt"))
            case "float": return f"{self.some((0, 9))}.{self.digits(1, 3)}"
            case "flag": return p(("true", "false", "True", "False", "on", "off", "yes", "no"))
            case "any": return self.value(p(("secret", "number", "name", "person", "place", "date",
                                             "colour", "thing", "money", "float", "time", "food",
                                             "animal", "seconds", "secret", "number", "job")))
        return w(kind)
