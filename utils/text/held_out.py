"""Which text is held out from training: files and splits by their names, and documents of a text
that keeps none apart."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from utils.text.files import split_name

TRAIN, VALID, TEST = "train", "valid", "test"
"""What a file or split is for. Test text is neither trained on nor validated on."""
KIND_OF_WORD = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("valid", "validation", "val", "dev"), VALID),
    "test": TEST,
}
SHARD = re.compile(r"[-_. ]*\d+([-_. ]of[-_. ]\d+([-_. ][0-9a-f]{8,})?)?$")
"""The number at the end of a name that is one of several parts, and the hash behind it that the hub
once gave each part."""
GOLDEN_RATIO = (5**0.5 - 1) / 2


def name_words(name: str) -> tuple[str, ...]:
    """Returns the words of a name in lower case, without the number of a part."""
    return tuple(re.split(r"[-_. ]+", SHARD.sub("", name.casefold())))


def kind_by_words(words: tuple[str, ...], siblings: Collection[tuple[str, ...]]) -> str:
    """Returns what something is for by the words of its name: `valid` is held out, and so is
    `stories-valid` beside `stories-train`; `driving-test` alone is a text like any other."""
    if len(words) == 1:
        return KIND_OF_WORD.get(words[0], TRAIN)
    for position, word in enumerate(words):
        for train_word in ("train", "training"):
            twin = (*words[:position], train_word, *words[position + 1 :])
            if twin in siblings and word in KIND_OF_WORD:
                return KIND_OF_WORD[word]
    return TRAIN


def sort_files(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Returns the files for each of TRAIN, VALID and TEST, given paths relative to the folder that
    holds them all. A folder's name counts for all files in it."""
    files = list(files)
    siblings: dict[Path, set[tuple[str, ...]]] = defaultdict(set)
    for file in files:
        for path in (file, *file.parents[:-1]):
            siblings[path.parent].add(path_words(path, file))

    def kind_of(file: Path) -> str:
        paths = [*reversed(file.parents[:-1]), file]
        kinds = [kind_by_words(path_words(p, file), siblings[p.parent]) for p in paths]
        return next((kind for kind in kinds if kind != TRAIN), TRAIN)

    sorted_files: dict[str, list[Path]] = {TRAIN: [], VALID: [], TEST: []}
    for file in files:
        sorted_files[kind_of(file)].append(file)
    return sorted_files


def path_words(path: Path, file: Path) -> tuple[str, ...]:
    """Returns the words of a file's name, or of a folder's that it is in."""
    return name_words(split_name(path.name)[0] if path == file else path.name)


def splits_for(kind: str, names: Iterable[str]) -> list[str]:
    """Returns the splits of a dataset that are TRAIN or VALID: those that are named so, else those
    whose first word is."""
    words = {name: name_words(name) for name in names}
    exact = [n for n, w in words.items() if len(w) == 1 and KIND_OF_WORD.get(w[0]) == kind]
    return exact or [name for name, w in words.items() if KIND_OF_WORD.get(w[0]) == kind]


def choose_documents(lengths: list[int], fraction: float) -> set[int]:
    """Returns which documents of a text to hold out: whole ones whose share of the text is as near
    to `fraction` as may be, spread over the text. They follow from the lengths alone.

    It returns none where whole documents cannot give that share: where there is only one, or the
    others are too short and the next would be most of the text.
    """
    total = sum(lengths)
    target = left = fraction * total
    # Fractional parts of multiples of the golden ratio: any number of the first is spread evenly.
    order = np.argsort((0.5 + GOLDEN_RATIO * np.arange(len(lengths))) % 1).tolist()
    chosen = set()
    for document in order:
        if lengths[document] <= left:
            chosen.add(document)
            left -= lengths[document]
    others = [document for document in order if document not in chosen]
    if len(others) > 1:
        shortest = min(others, key=lengths.__getitem__)
        excess = lengths[shortest] - left
        has_too_little = left > target / 2
        if excess < left or (has_too_little and target + excess <= max(total / 2, target)):
            chosen.add(shortest)
            left = -excess
    return chosen if left <= target / 2 else set()
