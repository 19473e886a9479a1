"""Which tokens begin and end a text, and where a tokenizer puts them."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from config import InputError
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR
from utils.text.special_tokens import SETTINGS_FILES, SpecialTokens, start_ids
from utils.text.tokenizer import learn_tokenizer, read_tokenizer, tokenizer_identity

NAMES = [SEPARATOR, "<bos>", "<own>", "<generation>", "<config>", "<map>"]
"""Special tokens, by id."""


@pytest.fixture
def folder(tmp_path):
    """A tokenizer that has NAMES as special tokens, and no settings."""
    content = json.loads(learn_tokenizer(builtin_stories(30), 300).to_str())
    vocabulary = {token: rank + len(NAMES) for token, rank in content["model"]["vocab"].items()}
    content["model"]["vocab"] = vocabulary | {name: i for i, name in enumerate(NAMES)}
    tokenizer = Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
    tokenizer.add_special_tokens(NAMES)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_settings(folder, **settings):
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_tokenizers_own_end_of_text_comes_first_and_then_the_other_files(folder):
    write_settings(
        folder,
        tokenizer_config={"eos_token": {"content": "<own>"}},
        generation_config={"eos_token_id": [3, 0]},
        config={"eos_token_id": 4},
        special_tokens_map={"eos_token": "<map>"},
    )
    stop_ids = [(2, 3, 0), (3, 0), (4,), (5,), (0,)]
    for expected, file in zip(stop_ids, [*SETTINGS_FILES, ""], strict=True):
        _, special = read_tokenizer(str(folder))
        assert special.stop_ids == expected and special.eos_id == expected[0]
        if file:
            (folder / file).unlink()


def test_what_a_file_names_and_the_tokenizer_lacks_is_no_end_of_text(folder):
    write_settings(
        folder,
        tokenizer_config={"eos_token": "<none>"},
        generation_config={"eos_token_id": [-1, 10**6, True, None]},
        config={"eos_token_id": 4},
    )
    _, special = read_tokenizer(str(folder))
    assert special.stop_ids == (4,)


def test_an_option_names_the_end_of_text_where_nothing_does(folder):
    text = (folder / "tokenizer.json").read_text().replace(SEPARATOR, "<end>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"has no token that ends a text.*--data.eos-token"):
        read_tokenizer(str(folder))
    assert read_tokenizer(str(folder), "<end>")[1].stop_ids == (0,)
    with pytest.raises(InputError, match=r"data.eos_token = <stop>: .* has no such token"):
        read_tokenizer(str(folder), "<stop>")


@pytest.mark.parametrize("puts_bos_first", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_a_text_begins_as_transformers_begins_it(folder, puts_bos_first, add_bos_token):
    tokenizer, _ = read_tokenizer(str(folder))
    if puts_bos_first:
        tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>"}
    if add_bos_token is not None:
        settings["add_bos_token"] = add_bos_token
    write_settings(folder, tokenizer_config=settings | {"eos_token": "<own>"})
    tokenizer, special = read_tokenizer(str(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("One day").ids == theirs("One day")["input_ids"]
    assert start_ids(tokenizer) == ([1] if puts_bos_first else []) and special.bos_id == 1


@pytest.mark.parametrize("file", [*SETTINGS_FILES, "chat_template.jinja"])
def test_another_settings_file_is_another_tokenizer(folder, file):
    before = tokenizer_identity(str(folder), 0)
    (folder / file).write_text('{"eos_token": "<own>"}')
    assert tokenizer_identity(str(folder), 0) != before


def test_the_chat_template_is_that_of_its_own_file_or_of_the_settings(folder):
    assert read_tokenizer(str(folder))[1] == SpecialTokens((0,))
    write_settings(folder, tokenizer_config={"chat_template": "{{ 1 }}"})
    assert read_tokenizer(str(folder))[1].chat_template == "{{ 1 }}"
    (folder / "chat_template.jinja").write_text("{{ 2 }}")
    assert read_tokenizer(str(folder))[1].chat_template == "{{ 2 }}"
