import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from config import InputError, ModelConfig
from models import SLM
from transfer import State
from utils import stories, tokens
from utils.checkpoint import Checkpoint, save
from utils.generate import generate, main
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


def drawn(model, length=30, temperature=1.0, top_k=50, seed=0, eos=NEVER):
    generator = torch.Generator().manual_seed(seed)
    return generate(model, [START], length, eos, temperature, top_k, generator)[0]


def test_temperature_0_takes_the_likeliest_token_also_beyond_the_context(model):
    want = greedy(model, 30)
    assert drawn(model, temperature=0) == drawn(model, temperature=0, seed=1) == want
    assert len(want) > CONFIG.seq_len and len(set(want)) > 2


def test_one_candidate_or_next_to_no_temperature_is_greedy(model):
    assert drawn(model, top_k=1) == drawn(model, temperature=1e-6) == greedy(model, 30)


def test_the_draws_follow_from_the_seed_alone_and_stay_among_the_likeliest(model):
    assert drawn(model) == drawn(model) != drawn(model, seed=1)
    assert drawn(model, top_k=10**6, length=5) == drawn(model, top_k=300, length=5)
    text = START + drawn(model, top_k=3, temperature=5.0)
    for end in range(len(START), len(text)):
        context = torch.tensor([text[:end][-CONFIG.seq_len :]])
        assert text[end] in model(context).logits[0, -1].topk(3).indices


def test_the_frequency_of_a_draw_is_its_probability(model):
    chances = (model(torch.tensor([START])).logits[0, -1] / 2).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = [generate(model, [START], 1, NEVER, 2.0, 300, generator)[0][0] for _ in range(500)]
    found = torch.tensor(draws).bincount(minlength=300) / len(draws)
    assert (found - chances).abs().max() < 0.08  # more than 3.5 standard deviations of any share


def test_it_ends_before_the_end_of_the_text(model):
    want = greedy(model, 30)
    for eos in set(want):
        assert drawn(model, temperature=0, eos=eos) == want[: want.index(eos)]
    assert drawn(model, length=0) == []


def test_texts_written_together_are_those_written_alone(model):
    starts = [[5], START, [9] * (CONFIG.seq_len + 3), [20, 21]]
    alone = [generate(model, [start], 30, NEVER, 0, 1, None)[0] for start in starts]
    assert generate(model, starts, 30, NEVER, 0, 1, None) == alone
    eos = alone[1][4]  # some end, others go on
    ended = [text[: text.index(eos)] if eos in text else text for text in alone]
    assert generate(model, starts, 30, eos, 0, 1, None) == ended
    assert generate(model, [], 30, NEVER, 0, 1, None) == []


def test_a_story_begins_with_its_prompt_and_goes_on(model, checkpoint, capsys):
    main(checkpoint, PROMPT, length=20, device="cpu")
    told = capsys.readouterr().out
    assert told.startswith(PROMPT) and len(told) > len(PROMPT) + 5
    main(checkpoint, PROMPT, length=20, device="cpu")
    assert capsys.readouterr().out == told
    main(checkpoint, PROMPT, length=20, seed=1, device="cpu")
    assert capsys.readouterr().out != told
    tokenizer = Tokenizer.from_str(torch.load(checkpoint)["tokenizer"])
    generator = torch.Generator().manual_seed(0)
    want = told_stories(model, tokenizer, 0, [PROMPT], 20, generator=generator)
    assert told == want[0] + "\n"


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"prompt": ""}, "prompt = '' is empty"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"length": -1}, "length = -1"),
        ({"device": "tpu"}, "device = tpu"),
    ],
)
def test_a_bad_setting_is_refused_by_name(checkpoint, bad, says):
    settings = {"prompt": PROMPT, "device": "cpu"} | bad
    with pytest.raises(InputError, match=re.escape(says)):
        main(checkpoint, settings.pop("prompt"), **settings)


def test_the_command_tells_a_story_or_which_checkpoint_is_missing(checkpoint):
    def told(*args):
        command = [sys.executable, "-m", "utils.generate", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = told(checkpoint, PROMPT, "--length", "5", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.startswith(PROMPT) and not done.stderr
    lost = told("none.pt", PROMPT)
    assert (lost.returncode, lost.stdout) == (2, "")
    assert lost.stderr == "error: none.pt: there is no such checkpoint\n"
