"""The built-in stories."""

import re
from itertools import islice

from utils.text.builtin.stories import builtin_stories

THOUSAND = list(builtin_stories(1000))


def test_a_story_follows_from_its_seed_and_number_alone():
    assert list(builtin_stories(10)) == list(islice(builtin_stories(5000), 10)) == THOUSAND[:10]
    assert not set(builtin_stories(100, seed=1)) & set(THOUSAND)


def test_no_story_comes_twice():
    stories = list(builtin_stories(5000))
    assert len(set(stories)) == len(stories)


def test_stories_are_short_and_share_a_small_vocabulary():
    assert all(80 <= len(story.split()) <= 200 for story in THOUSAND)
    words = {word.lower() for story in THOUSAND for word in re.findall("[A-Za-z]+", story)}
    assert 800 <= len(words) <= 1500


def test_articles_spaces_and_quotation_marks_are_right():
    wrong = re.compile(r"[{}\[\]|]|  |\b[Aa]n [^aeiou]|\b[Aa] [aeiou]|[\n ][,.!?]|[.!?]\"[.,]|\.\.")
    for story in THOUSAND:
        assert not wrong.search(story) and story == story.strip()
        assert all(paragraph.count('"') % 2 == 0 for paragraph in story.split("\n\n"))


def test_sentences_begin_with_a_capital():
    for story in THOUSAND:
        assert not re.search(r'[.]"? [a-z]|\n[a-z]|[.!?] "[a-z]', story), story


def test_stories_open_in_a_few_ways():
    openings = {" ".join(story.split()[:2]) for story in THOUSAND}
    assert {"Once upon", "Once there", "There once"} < openings
    assert all(opening.split()[0] in ("Once", "There", "One") for opening in openings)
