import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CONFIGS, trained_like
from tokenizers import Tokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from config import InputError, ModelConfig
from models import SLM
from transfer import State
from utils import stories, tokens
from utils.checkpoint import Checkpoint, save
from utils.generate import UNKNOWN, Sampling, draws, encoded, generate, main, streamed
from utils.generate import stories as told_stories

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(300, d_model=24, n_layers=2, n_heads=2, d_ff=40, seq_len=8, tied=False)
START = [5, 6, 7]
PROMPT = "Once upon a time"
NEVER = -1
"""No token that would end a text."""


@pytest.fixture(scope="module")
def model():
    """Weights large enough for sharp and varied choices."""
    torch.manual_seed(0)
    state = State.of(SLM(CONFIG))
    return State(CONFIG, {n: 8 * w if w.dim() > 1 else w for n, w in state.weights.items()}).model()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "a.pt"
    tokenizer = tokens.learn(stories.stories(30), CONFIG.vocab_size).to_str()
    save(path, Checkpoint(CONFIG, State.of(model).weights, tokenizer, 0))
    return path


def greedy(model, length):
    text = list(START)
    for _ in range(length):
        logits = model(torch.tensor([text[-CONFIG.seq_len :]])).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(START) :]


def drawn(model, length=30, temperature=1.0, eos=NEVER, **settings):
    return generate(model, [START], length, eos, Sampling(temperature, **settings))[0]


def test_temperature_0_takes_the_likeliest_token_also_beyond_the_context(model):
    want = greedy(model, 30)
    assert drawn(model, temperature=0) == drawn(model, temperature=0, seed=1) == want
    assert len(want) > CONFIG.seq_len and len(set(want)) > 2


def test_one_candidate_or_next_to_no_temperature_is_greedy(model):
    assert drawn(model, top_k=1) == drawn(model, temperature=1e-6) == greedy(model, 30)


def test_the_draws_follow_from_the_seed_alone_and_stay_among_the_likeliest(model):
    assert drawn(model) == drawn(model) != drawn(model, seed=1)
    assert drawn(model, top_k=10**6) == drawn(model, top_k=300) == drawn(model, top_k=0)
    text = START + drawn(model, top_k=3, temperature=5.0)
    for end in range(len(START), len(text)):
        context = torch.tensor([text[:end][-CONFIG.seq_len :]])
        assert text[end] in model(context).logits[0, -1].topk(3).indices


@pytest.mark.parametrize("temperature, top_k, top_p", [(2.0, 0, 1.0), (1.5, 6, 1.0), (4.0, 0, 0.5)])
def test_the_frequency_of_a_draw_is_the_chance_that_transformers_gives_it(
    model, temperature, top_k, top_p
):
    logits = model(torch.tensor([START])).logits[:, -1]
    want = TemperatureLogitsWarper(temperature)(None, logits)
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = TopPLogitsWarper(top_p)(None, want).softmax(-1)[0]
    settings = Sampling(temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(0)
    draws = settings.pick(logits.expand(2000, -1), [generator] * 2000)
    found = torch.tensor(draws).bincount(minlength=300) / len(draws)
    assert (found - want).abs().max() < 0.04  # more than 3.5 standard deviations of any share
    assert not found[want == 0].any() and (want > 0).sum() > 2


def test_the_likeliest_token_is_drawn_however_small_top_p(model):
    assert drawn(model, top_p=1e-9) == greedy(model, 30)


def test_it_ends_before_the_end_of_the_text(model):
    want = greedy(model, 30)
    for eos in set(want):
        assert drawn(model, temperature=0, eos=eos) == want[: want.index(eos)]
    assert drawn(model, length=0) == []


@pytest.mark.parametrize("base", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_texts_written_together_are_those_written_alone(base, temperature):
    model = trained_like(base)
    starts = [[5], START, [9] * (base.seq_len + 3), [20, 21], [8] * (base.seq_len - 2)]
    alone = [
        generate(model, [start], 30, NEVER, Sampling(temperature, seed=4 + i))[0]
        for i, start in enumerate(starts)
    ]
    assert generate(model, starts, 30, NEVER, Sampling(temperature, seed=4)) == alone
    for eos in {text[4] for text in alone}:  # some end, others go on
        ended = [text[: text.index(eos)] if eos in text else text for text in alone]
        assert generate(model, starts, 30, eos, Sampling(temperature, seed=4)) == ended
    assert generate(model, [], 30, NEVER, Sampling()) == []


def test_two_stories_with_the_same_prompt_are_not_the_same(model):
    one, other = generate(model, [START, START], 30, NEVER, Sampling())
    assert one != other


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_cache_changes_nothing_also_when_the_context_slides(config):
    model = trained_like(config)
    start, length = [1, 2, 3], 2 * config.seq_len
    text = list(start)
    for _ in range(length):
        logits = model(torch.tensor([text[-config.seq_len :]])).logits
        text.append(int(logits[0, -1].argmax()))
    assert generate(model, [start], length, NEVER, Sampling(0))[0] == text[3:]


def test_within_the_context_each_token_is_read_once(model):
    read = []
    watch = model.embed.register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    try:
        generate(model, [START, [1, 2]], 7, NEVER, Sampling(0))
    finally:
        watch.remove()
    assert read == [3, 1, 1, 1, 1, 1, 8]  # and then the context of 8 slides


def test_a_token_is_given_out_before_the_next_is_drawn(model):
    stream = draws(model, [START], 10**9, NEVER, Sampling())
    assert [i for i, _ in (next(stream), next(stream))] == [0, 0]
    assert list(draws(model, [START], 0, NEVER, Sampling())) == [(0, None)]


def test_a_story_begins_with_its_prompt_and_goes_on(model, checkpoint, capsys):
    main(checkpoint, (PROMPT,), length=20, device="cpu")
    told = capsys.readouterr().out
    assert told.startswith(PROMPT) and len(told) > len(PROMPT) + 5
    main(checkpoint, (PROMPT,), length=20, device="cpu")
    assert capsys.readouterr().out == told
    main(checkpoint, (PROMPT,), length=20, seed=1, device="cpu")
    assert capsys.readouterr().out != told
    tokenizer = Tokenizer.from_str(torch.load(checkpoint)["tokenizer"])
    prompts = PROMPT, "One day", "It was"
    want = told_stories(model, tokenizer, 0, prompts, 20, Sampling())
    assert told == want[0] + "\n"
    main(checkpoint, prompts, length=20, device="cpu")
    assert capsys.readouterr().out == "\n\n".join(want) + "\n"


def test_no_character_is_printed_by_halves(checkpoint):
    tokenizer = Tokenizer.from_str(torch.load(checkpoint)["tokenizer"])
    text = "né 日本 🙂"
    ids, (start,) = encoded(tokenizer, [text])[0], encoded(tokenizer, ["On"])
    assert any(UNKNOWN in tokenizer.decode([i]) for i in ids)
    half = ids[-1:]  # a last byte without the first
    for other in ids, ids[:-1], half + ids, []:
        drawn = [(1, i) for i in other] + [(0, i) for i in ids] + [(0, None), (1, None)]
        pieces = list(streamed(tokenizer, [start, start], drawn))
        told = tokenizer.decode(start + ids), tokenizer.decode(start + other)
        assert "".join(pieces) == "\n\n".join(told) + "\n"
        first = pieces[: pieces.index("\n\n")]
        assert UNKNOWN not in "".join(first) and len(set(first)) > 5, "as it comes"


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"prompts": ("One", "")}, "prompt = '' is empty"),
        ({"prompts": ()}, "prompts = () is empty"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"seed": -1}, "seed = -1"),
        ({"length": -1}, "length = -1"),
        ({"device": "tpu"}, "device = tpu"),
    ],
)
def test_a_bad_setting_is_refused_by_name(checkpoint, bad, says):
    settings = {"prompts": (PROMPT,), "device": "cpu"} | bad
    with pytest.raises(InputError, match=re.escape(says)):
        main(checkpoint, settings.pop("prompts"), **settings)


def test_whoever_has_read_enough_leaves_without_a_traceback(checkpoint):
    command = [sys.executable, "-m", "utils.generate", checkpoint, *9 * ["A"], "--length", "9999"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        writer.stdout.read(1)
        writer.stdout.close()
        assert (writer.wait(timeout=60), writer.stderr.read()) == (141, b"")


def test_the_command_tells_a_story_or_which_checkpoint_is_missing(checkpoint):
    def told(*args):
        command = [sys.executable, "-m", "utils.generate", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = told(checkpoint, PROMPT, "One day", "--length", "5", "--top-p", "0.9", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.startswith(PROMPT) and not done.stderr
    assert done.stdout.count("\n\nOne day") == 1
    lost = told("none.pt", PROMPT)
    assert (lost.returncode, lost.stdout) == (2, "")
    assert lost.stderr == "error: none.pt: there is no such checkpoint\n"
