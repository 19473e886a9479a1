import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from config import InputError, ModelConfig
from models import SLM, KVCache
from tests.helpers.small_models import CONFIGS, random_model
from transfer import TrainState
from utils.checkpoint.model import Checkpoint, load_checkpoint, save_checkpoint
from utils.generate.__main__ import main
from utils.generate.sampling import Sampling
from utils.generate.stories import (
    REPLACEMENT,
    draw_tokens,
    encode_prompts,
    generate,
    next_logits,
    sample_tokens,
    stream_stories,
    stream_text,
    write_stories,
)
from utils.text.builtin.stories import builtin_stories
from utils.text.special_tokens import SpecialTokens
from utils.text.tokenizer import learn_tokenizer

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(
    300, d_model=24, n_layers=2, n_heads=2, d_ff=40, seq_len=8, tie_embeddings=False
)
START = [5, 6, 7]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model():
    """Weights large enough for sharp and varied choices."""
    torch.manual_seed(0)
    weights = TrainState.from_model(SLM(CONFIG)).weights
    large = {name: 8 * w if w.dim() > 1 else w for name, w in weights.items()}
    return TrainState(CONFIG, large).model()


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(builtin_stories(30), CONFIG.vocab_size)


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "a.pt"
    weights = TrainState.from_model(model).weights
    save_checkpoint(path, Checkpoint(CONFIG, weights, tokenizer.to_str(), SpecialTokens((0,))))
    return path


def generate_without_cache(model, start, length):
    text, size = list(start), model.config.seq_len
    for _ in range(length):
        logits = model(torch.tensor([text[-size:]])).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(start) :]


def generate_one(model, length=30, temperature=1.0, stop_ids=(), **sampling):
    return generate(model, [START], length, stop_ids, Sampling(temperature, **sampling))[0]


def test_temperature_0_takes_the_likeliest_token_also_beyond_the_context(model):
    expected = generate_without_cache(model, START, 30)
    for seed in (0, 1):
        assert generate_one(model, temperature=0, seed=seed) == expected
    assert len(expected) > CONFIG.seq_len and len(set(expected)) > 2


def test_one_candidate_or_next_to_no_temperature_is_greedy(model):
    expected = generate_without_cache(model, START, 30)
    for sampling in ({"top_k": 1}, {"temperature": 1e-6}, {"top_p": 1e-9}):
        assert generate_one(model, **sampling) == expected


def test_the_draws_follow_from_the_seed_alone_and_stay_among_the_likeliest(model):
    assert generate_one(model) == generate_one(model) != generate_one(model, seed=1)
    all_tokens = generate_one(model, top_k=0)
    assert generate_one(model, top_k=10**6) == generate_one(model, top_k=300) == all_tokens
    text = START + generate_one(model, top_k=3, temperature=5.0)
    for end in range(len(START), len(text)):
        context = torch.tensor([text[:end][-CONFIG.seq_len :]])
        assert text[end] in model(context).logits[0, -1].topk(3).indices


@pytest.mark.parametrize("temperature, top_k, top_p", [(2.0, 0, 1.0), (1.5, 6, 1.0), (4.0, 0, 0.5)])
def test_tokens_are_as_frequent_as_they_are_probable_to_transformers(
    model, temperature, top_k, top_p
):
    logits = model(torch.tensor([START])).logits[:, -1]
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected).softmax(-1)[0]
    sampling = Sampling(temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(0)
    tokens = sample_tokens(logits.expand(2000, -1), sampling, [generator] * 2000)
    frequency = torch.tensor(tokens).bincount(minlength=300) / len(tokens)
    # 0.04 is more than 3.5 standard deviations of any share.
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.04)
    assert not frequency[expected == 0].any() and (expected > 0).sum() > 2


def test_a_text_ends_before_the_end_of_text_token(model):
    tokens = generate_without_cache(model, START, 30)
    for stop_ids in combinations(dict.fromkeys(tokens), 2):
        ended = generate_one(model, temperature=0, stop_ids=stop_ids)
        assert ended == tokens[: min(map(tokens.index, stop_ids))]
    assert generate_one(model, length=0) == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_texts_written_together_are_those_written_alone(config, temperature):
    model = random_model(config)
    starts = [[5], START, [9] * (config.seq_len + 3), [20, 21], [8] * (config.seq_len - 2)]
    alone = [
        generate(model, [start], 30, (), Sampling(temperature, seed=4 + i))[0]
        for i, start in enumerate(starts)
    ]
    assert generate(model, starts, 30, (), Sampling(temperature, seed=4)) == alone
    for eos_id in {text[4] for text in alone}:  # some end, others go on
        ended = [text[: text.index(eos_id)] if eos_id in text else text for text in alone]
        assert generate(model, starts, 30, [eos_id], Sampling(temperature, seed=4)) == ended
    assert generate(model, [], 30, (), Sampling()) == []


def test_two_stories_with_the_same_prompt_are_not_the_same(model):
    one, other = generate(model, [START, START], 30, (), Sampling())
    assert one != other


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_cache_changes_nothing_also_when_the_context_slides(config):
    model, start, length = random_model(config), [1, 2, 3], 2 * config.seq_len
    expected = generate_without_cache(model, start, length)
    assert generate(model, [start], length, (), Sampling(0))[0] == expected


@torch.no_grad()
def test_within_the_context_no_token_is_read_again(model):
    cache = KVCache(CONFIG, rows=1, slots=CONFIG.seq_len, like=model.norm.weight)
    next_logits(model, [START], cache)
    overwritten = [0] * len(START)
    logits = next_logits(model, [[*overwritten, 9]], cache)
    expected = model(torch.tensor([[*START, 9]])).logits[:, -1]
    torch.testing.assert_close(logits, expected)


def test_a_token_is_given_out_before_the_next_is_drawn(model):
    drawn = draw_tokens(model, [START], 10**9, (), Sampling())
    assert [i for i, _ in (next(drawn), next(drawn))] == [0, 0]
    assert list(draw_tokens(model, [START], 0, (), Sampling())) == [(0, None)]


def test_a_story_begins_with_its_prompt_and_goes_on(model, tokenizer, checkpoint, capsys):
    def printed(*prompts, seed=0):
        main(checkpoint, prompts, length=20, sampling=Sampling(seed=seed), device="cpu")
        return capsys.readouterr().out

    story = printed(PROMPT)
    assert story.startswith(PROMPT) and len(story) > len(PROMPT) + 5
    assert printed(PROMPT) == story != printed(PROMPT, seed=1)
    prompts = PROMPT, "One day", "It was"
    stories = write_stories(model, tokenizer, (0,), prompts, 20, Sampling())
    assert story == stories[0] + "\n"
    assert printed(*prompts) == "\n\n".join(stories) + "\n"


def test_a_model_whose_weights_are_of_several_dtypes_writes_a_story(checkpoint, tmp_path, capsys):
    saved = load_checkpoint(checkpoint)
    name = next(name for name in saved.weights if "q_proj" in name)
    saved.weights[name] = saved.weights[name].bfloat16()
    save_checkpoint(tmp_path / "mixed.pt", saved)
    main(tmp_path / "mixed.pt", (PROMPT,), length=5, device="cpu")
    assert capsys.readouterr().out.startswith(PROMPT)


def test_a_prompt_follows_what_its_tokenizer_puts_in_front_of_every_text(tokenizer):
    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = TemplateProcessing("<x> $A <x>", special_tokens=[("<x>", 7)])
    (plain,), (start,) = (encode_prompts(each, [PROMPT], 300) for each in (tokenizer, own))
    assert start == [7, *plain]


def test_no_character_is_printed_by_halves(tokenizer):
    text = "né 日本 🙂"
    ids, (start,) = (
        encode_prompts(tokenizer, [text], 300)[0],
        encode_prompts(tokenizer, ["On"], 300),
    )
    assert any(REPLACEMENT in tokenizer.decode([i]) for i in ids)
    half = ids[-1:]  # a last byte without the first
    for other in ids, ids[:-1], half + ids, []:
        drawn = [(1, i) for i in other] + [(0, i) for i in ids] + [(0, None), (1, None)]
        parts = list(stream_stories(tokenizer, [start, start], iter(drawn)))
        stories = tokenizer.decode(start + ids), tokenizer.decode(start + other)
        assert "".join(parts) == "\n\n".join(stories) + "\n"
        first = parts[: parts.index("\n\n")]
        assert REPLACEMENT not in "".join(first) and len(set(first)) > 5, "as it comes"


def test_a_byte_that_breaks_a_character_does_not_end_the_story():
    """A tokenizer like Llama's decodes all bytes in a row together: one that does not fit makes no
    character of any of them, and those that have been printed stay."""
    letters = {"a": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(letters, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    smile = [byte + 1 for byte in "🙂".encode()]
    printed = "".join(stream_text(tokenizer, [0, *smile, smile[-1], 0, *smile, 0]))
    assert printed.startswith("a🙂" + REPLACEMENT) and printed.endswith("🙂a")


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
    ],
)
def test_a_sampling_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=re.escape(f"{field} = {value}")):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"prompts": ("One", "")}, "prompt = '' is empty"),
        ({"prompts": ()}, "prompts = () is empty"),
        ({"length": -1}, "length = -1"),
        ({"device": "tpu"}, "device = tpu"),
    ],
)
def test_a_bad_setting_is_refused_by_name(checkpoint, changed, reason):
    settings = {"prompts": (PROMPT,), "device": "cpu"} | changed
    with pytest.raises(InputError, match=re.escape(reason)):
        main(checkpoint, settings.pop("prompts"), **settings)


def test_a_prompt_that_the_model_has_no_row_for_is_one_line_that_names_the_token(
    model, tokenizer, tmp_path
):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["[PAD]"])
    weights = TrainState.from_model(model).weights
    save_checkpoint(
        tmp_path / "a.pt", Checkpoint(CONFIG, weights, tokenizer.to_str(), SpecialTokens((0,)))
    )
    named = r"^prompt = '\[PAD\] One': token 300 \('\[PAD\]'\) is none of the model's, .* 300 \("
    with pytest.raises(InputError, match=named):
        main(tmp_path / "a.pt", ("One", "[PAD] One"), device="cpu")
    main(tmp_path / "a.pt", ("One",), length=2, device="cpu")


def test_whoever_has_read_enough_leaves_without_a_traceback(checkpoint):
    command = [sys.executable, "-m", "utils.generate", checkpoint, *9 * ["A"], "--length", "9999"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        writer.stdout.read(1)
        writer.stdout.close()
        assert (writer.wait(timeout=60), writer.stderr.read()) == (141, b"")


def test_the_command_writes_stories_or_says_which_checkpoint_is_missing(checkpoint):
    def run(*args):
        command = [sys.executable, "-m", "utils.generate", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(checkpoint, PROMPT, "One day", "--length", "5", "--top-p", "0.9", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.startswith(PROMPT) and not done.stderr
    assert done.stdout.count("\n\nOne day") == 1
    lost = run("none.pt", PROMPT)
    assert (lost.returncode, lost.stdout) == (2, "")
    assert lost.stderr == "error: none.pt: there is no such checkpoint\n"
