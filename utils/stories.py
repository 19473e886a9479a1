"""Built-in stories from a small seeded grammar, for runs that need no network."""

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random

from utils import plots, words

Part = str | list[list["Part"]]
"""Text, or its alternatives."""
Pick = Callable[[Sequence], str]

PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
ADULTS = [
    *((adult, "girl") for adult in words.WOMEN),
    *((adult, "boy") for adult in words.MEN),
]


def stories(count: int, seed: int = 0) -> Iterator[str]:
    """Story i is a pure function of (seed, i)."""
    return (story(Random(f"{seed} {index}")) for index in range(count))


def story(rng: Random) -> str:
    """A blank line ends a paragraph, other white space is one space; `a` becomes `an` by itself."""

    def pick(items: Sequence) -> str:  # twice as fast as rng.choice
        return items[int(rng.random() * len(items))]

    text = expand(pick(PLOTS), pick).format_map(facts(pick))
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f" A {vowel}", f" An {vowel}")
    return text


def expand(parts: Sequence[Part], pick: Pick) -> str:
    return "".join(p if isinstance(p, str) else expand(pick(p), pick) for p in parts)


def parse(text: str) -> list[Part]:
    """`a [b|c]d` becomes ["a ", [["b"], ["c"]], "d"]; alternatives may hold alternatives."""
    parts: list[Part] = []
    around = []
    for token in re.findall(r"[\[\]|]|[^\[\]|]+", text):
        if token == "[":
            around.append((parts, []))
            parts = []
        elif token == "]":
            outer, alternatives = around.pop()
            parts = [*outer, [*alternatives, parts]]
        elif token == "|":
            around[-1][1].append(parts)
            parts = []
        else:
            parts.append(token)
    return parts


def plot(opening: str, body: str, one_day: str, one_night: str) -> list[Part]:
    text = f"{opening} {body}"
    for name, meaning in {
        "likes": plots.LIKES,
        "sky": plots.SKY,
        "moral": plots.MORAL,
        "one_day": one_day,
        "one_night": one_night,
    }.items():
        text = text.replace(f"{{{name}}}", meaning)
    return parse(text)


PLOTS = [
    *(plot(plots.OPENING, body, "[One {day},|One day,]", "One night") for body in plots.BODIES),
    *(
        plot(plots.ONE_DAY_OPENING, body, "[Later,|Soon after,|A little later,]", "That night")
        for body in plots.BODIES
    ),
]


ONE = {
    "look": words.LOOKS,
    "foods": words.FOODS,
    "plant": words.PLANTS,
    "nook": words.INSIDE,
    "jar": words.JARS,
    "chore": words.CHORES,
    "skill": words.SKILLS,
    "fear": words.FEARS,
    "cause": words.CAUSES,
    "day": words.DAYS,
    "glad": words.GLAD,
    "sad": words.SAD,
    "pet": words.PETS,
}
TWO = {
    "trait": words.TRAITS,
    "color": words.COLORS,
    "toy": words.TOYS,
    "spot": words.OUTSIDE,
    "animal": words.SMALL,
}


def facts(pick: Pick) -> dict[str, str]:
    """Who, what and where: the same through a whole story."""
    at, at2 = two(words.PLACES, pick)
    weather = pick(words.WEATHER)
    number = pick(words.NUMBERS)
    found = {
        "at": at,
        "at2": at2,
        "place": at.partition(" ")[2],
        "weather": weather,
        "Weather": weather.capitalize(),
        "number": number,
        "Number": number.capitalize(),
        "often": pick(("morning", "day", "afternoon")),
        "size": pick(("tiny", "small", "little")),
    }
    for name, kind in ONE.items():
        found[name] = pick(kind)
    for name, kind in TWO.items():
        found[name], found[f"{name}2"] = two(kind, pick)
    return found | people(pick)


def two(items: Sequence[str], pick: Pick) -> tuple[str, str]:
    """Two that differ."""
    one = other = pick(items)
    while other == one:
        other = pick(items)
    return one, other


def people(pick: Pick) -> dict[str, str]:
    """A hero, a friend, an adult and two animals."""
    kind, hero, he, him, his = person(pick)
    fkind, friend, fhe, fhim, fhis = person(pick)
    while friend == hero:
        fkind, friend, fhe, fhim, fhis = person(pick)
    adult, sex = pick(ADULTS)
    ahe, ahim, ahis = PRONOUNS[sex]
    return {
        "kind": kind, "hero": hero, "he": he, "him": him, "his": his,
        "He": he.capitalize(), "His": his.capitalize(),
        "fkind": fkind, "friend": friend, "fhe": fhe, "fhim": fhim, "fhis": fhis,
        "Fhis": fhis.capitalize(),
        "adult": adult, "his_adult": f"{his.capitalize()} {adult}",
        "ahe": ahe, "ahim": ahim, "ahis": ahis, "Ahe": ahe.capitalize(),
    }  # fmt: skip


def person(pick: Pick) -> tuple[str, ...]:
    """Kind, name and pronouns; children as often as animals."""
    sex = pick(("girl", "boy"))
    if pick((True, False)):
        return sex, pick(words.GIRLS if sex == "girl" else words.BOYS), *PRONOUNS[sex]
    return pick(words.YOUNG), pick(words.PETS), *PRONOUNS[sex]
