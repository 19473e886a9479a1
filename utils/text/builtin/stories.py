"""Built-in stories from a small seeded grammar, for runs that need no network.

A story is a template (story_templates.py) in which one alternative is chosen at each `[a|b]`, and
whose facts (`{hero}`, `{place}`), drawn from words.py, stay the same from beginning to end.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random

from utils.text.builtin import story_templates, words

TemplatePart = str | list[list["TemplatePart"]]
"""Text, or a list of alternatives, each of them a list of parts."""
Pick = Callable[[Sequence], str]
"""Picks one item of a sequence at random."""

PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
ADULTS = [
    *((adult, "girl") for adult in words.WOMEN),
    *((adult, "boy") for adult in words.MEN),
]
STORY_FACTS = {
    "look": words.LOOKS,
    "foods": words.FOODS,
    "plant": words.PLANTS,
    "nook": words.SPOTS_INSIDE,
    "jar": words.CROCKERY,
    "chore": words.CHORES,
    "skill": words.SKILLS,
    "fear": words.SCARY_SOUNDS,
    "cause": words.HARMLESS_CAUSES,
    "day": words.DAYS,
    "glad": words.GLAD_WORDS,
    "sad": words.SAD_WORDS,
    "pet": words.PET_NAMES,
}
"""Facts of which a story has one."""
PAIRED_STORY_FACTS = {
    "trait": words.TRAITS,
    "color": words.COLORS,
    "toy": words.TOYS,
    "spot": words.SPOTS_OUTSIDE,
    "animal": words.SMALL_ANIMALS,
}
"""Facts of which a story has two that differ, `{toy}` and `{toy2}`."""


def builtin_stories(count: int, seed: int = 0) -> Iterator[str]:
    """Yields stories 0 to `count` - 1. Story i follows from (seed, i) alone."""
    return (write_story(Random(f"{seed} {index}")) for index in range(count))


def write_story(rng: Random) -> str:
    """Returns a story: paragraphs separated by blank lines, with `a` and `an` where they belong."""

    def pick(items: Sequence) -> str:
        return items[int(rng.random() * len(items))]  # twice as fast as rng.choice

    text = expand(pick(STORY_TEMPLATES), pick).format_map(draw_facts(pick))
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f" A {vowel}", f" An {vowel}")
    return text


def expand(parts: Sequence[TemplatePart], pick: Pick) -> str:
    """Returns the text of a template with one of each list of alternatives."""
    return "".join(p if isinstance(p, str) else expand(pick(p), pick) for p in parts)


def parse_template(text: str) -> list[TemplatePart]:
    """Parses `a [b|c]d` into ["a ", [["b"], ["c"]], "d"]. Alternatives may hold alternatives."""
    parts: list[TemplatePart] = []
    enclosing = []
    for token in re.findall(r"[\[\]|]|[^\[\]|]+", text):
        if token == "[":
            enclosing.append((parts, []))
            parts = []
        elif token == "]":
            outer, alternatives = enclosing.pop()
            parts = [*outer, [*alternatives, parts]]
        elif token == "|":
            enclosing[-1][1].append(parts)
            parts = []
        else:
            parts.append(token)
    return parts


def make_template(opening: str, plot: str, one_day: str, one_night: str) -> list[TemplatePart]:
    """Returns the parsed template of a story. `one_day` and `one_night` say how the plot begins."""
    text = f"{opening} {plot}"
    for name, inner in {
        "likes": story_templates.LIKES,
        "sky": story_templates.SKY,
        "moral": story_templates.MORAL,
        "one_day": one_day,
        "one_night": one_night,
    }.items():
        text = text.replace(f"{{{name}}}", inner)
    return parse_template(text)


STORY_TEMPLATES = [
    make_template(opening, plot, one_day, one_night)
    for opening, one_day, one_night in (
        (story_templates.ONCE_OPENING, "[One {day},|One day,]", "One night"),
        (
            story_templates.ONE_DAY_OPENING,
            "[Later,|Soon after,|A little later,]",
            "That night",
        ),
    )
    for plot in story_templates.STORY_PLOTS.values()
]


def draw_facts(pick: Pick) -> dict[str, str]:
    """Returns who, what and where: the facts of one story, by name."""
    at, at2 = pick_two(words.PLACES, pick)
    weather = pick(words.WEATHER)
    number = pick(words.NUMBERS)
    facts = {
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
    for name, choices in STORY_FACTS.items():
        facts[name] = pick(choices)
    for name, choices in PAIRED_STORY_FACTS.items():
        facts[name], facts[f"{name}2"] = pick_two(choices, pick)
    return facts | draw_people(pick)


def pick_two(items: Sequence[str], pick: Pick) -> tuple[str, str]:
    """Returns two items that differ."""
    one = other = pick(items)
    while other == one:
        other = pick(items)
    return one, other


def draw_people(pick: Pick) -> dict[str, str]:
    """Returns the facts about a hero, a friend of another name, and an adult."""
    kind, hero, he, him, his = draw_person(pick)
    fkind, friend, fhe, fhim, fhis = draw_person(pick)
    while friend == hero:
        fkind, friend, fhe, fhim, fhis = draw_person(pick)
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


def draw_person(pick: Pick) -> tuple[str, ...]:
    """Returns the kind, name and three pronouns of a child or, as often, an animal."""
    sex = pick(("girl", "boy"))
    if pick((True, False)):
        names = words.GIRL_NAMES if sex == "girl" else words.BOY_NAMES
        return sex, pick(names), *PRONOUNS[sex]
    return pick(words.ANIMAL_HEROES), pick(words.PET_NAMES), *PRONOUNS[sex]
