import io
import json
import os
import re
import signal
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
from tests.helpers import gpu_models
from tests.helpers.small_models import CONFIGS, random_model
from transfer import TrainState
from utils.checkpoint.model import Checkpoint, load_checkpoint, save_checkpoint
from utils.generate import stories
from utils.generate.__main__ import main
from utils.generate.sampling import Sampling
from utils.generate.stories import (
    REPLACEMENT,
    Story,
    describe_story_end,
    draw_tokens,
    encode_prompts,
    format_story,
    generate,
    next_logits,
    sample_tokens,
    stream_stories,
    stream_text,
    write_stories,
)
from utils.metrics.history import HISTORY_FILE
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


@gpu_models.needs_fused_kernels
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    "config, dtype",
    [
        (gpu_models.DENSE, torch.float32),
        (gpu_models.DENSE, torch.bfloat16),
        (gpu_models.MOE, torch.bfloat16),
    ],
    ids=["float32", "bf16", "experts"],
)
def test_a_captured_pass_writes_what_a_pass_without_a_capture_does(
    config, dtype, temperature, monkeypatch
):
    torch.manual_seed(0)
    weights = TrainState.from_model(SLM(config)).weights
    large = {name: 8 * w if w.dim() > 1 else w for name, w in weights.items()}
    model = TrainState(config, large).model().to(gpu_models.CUDA, dtype)
    sampling, captured = Sampling(temperature, seed=4), []

    class CountedPass(stories.CapturedPass):
        def __init__(self, *args):
            super().__init__(*args)
            captured.append(self)

    monkeypatch.setattr(stories, "CapturedPass", CountedPass)

    def assert_same(starts, stop_ids=()):
        captured.clear()
        with_capture = generate(model, starts, 40, stop_ids, sampling)
        assert captured
        with monkeypatch.context() as patch:
            patch.setattr(stories, "is_worth_capturing", lambda *_: False)
            assert generate(model, starts, 40, stop_ids, sampling) == with_capture
        return with_capture

    single_tokens = assert_same([[5], [6], [7]])
    assert len({*map(tuple, single_tokens)}) == 3
    different_lengths = [[5], [5, 6, 7], [20, 21], [9] * 30]
    texts = assert_same(different_lengths)
    early = texts[1][4]
    ended = assert_same(different_lengths, [early])
    assert len(ended[1]) <= 4
    assert_same([[3, 4], [8] * (config.seq_len - 15)])  # the second grows beyond the context


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
    assert story.startswith(f"> {PROMPT}\n") and len(story) > len(PROMPT) + 50
    assert printed(PROMPT) == story != printed(PROMPT, seed=1)
    prompts = PROMPT, "One day", "It was"
    stories = write_stories(model, tokenizer, (0,), prompts, 20, Sampling())
    assert story == format_story(stories[0]) + "\n"
    assert printed(*prompts) == "\n\n".join(map(format_story, stories)) + "\n"
    starts = encode_prompts(tokenizer, prompts, 300)
    for story, start, more in zip(
        stories, starts, generate(model, starts, 20, (0,), Sampling()), strict=True
    ):
        assert story.prompt + story.continuation == tokenizer.decode(start + more)


def test_a_story_says_where_the_model_goes_on_and_what_ended_it(model, tokenizer):
    (story,) = write_stories(model, tokenizer, (), ["A cat\nsat"], 5, Sampling())
    assert format_story(story) == (
        f"> A cat\n> sat\n{story.continuation}\n(cut off at the limit of 5 tokens)"
    )
    (start,) = encode_prompts(tokenizer, ["A"], 300)
    tokens = generate(model, [start], 30, (), Sampling(0))[0]
    stop = next(token for token in tokens if tokens.index(token) > 1)
    (story,) = write_stories(model, tokenizer, [stop], ["A"], 30, Sampling(0))
    assert story.ending == f"(end of text after {tokens.index(stop)} tokens)"
    assert describe_story_end(1, 2) == "(end of text after 1 token)"


def test_a_model_whose_weights_are_of_several_dtypes_writes_a_story(checkpoint, tmp_path, capsys):
    saved = load_checkpoint(checkpoint)
    name = next(name for name in saved.weights if "q_proj" in name)
    saved.weights[name] = saved.weights[name].bfloat16()
    save_checkpoint(tmp_path / "mixed.pt", saved)
    main(tmp_path / "mixed.pt", (PROMPT,), length=5, device="cpu")
    assert capsys.readouterr().out.startswith(f"> {PROMPT}\n")


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
        parts = list(stream_stories(tokenizer, ["On"] * 2, [start, start], iter(drawn), 99))
        texts = [tokenizer.decode(start + added)[2:] for added in (ids, other)]
        ends = [describe_story_end(len(added), 99) for added in (ids, other)]
        stories = [Story("On", *story) for story in zip(texts, ends, strict=True)]
        assert "".join(parts) == "\n\n".join(map(format_story, stories)) + "\n"
        first = parts[: parts.index(f"\n{ends[0]}\n")]
        assert REPLACEMENT not in "".join(first) and len(set(first)) > 5, "as it comes"


def test_a_byte_that_breaks_a_character_does_not_end_the_story():
    """A tokenizer like Llama's decodes all bytes in a row together: one that does not fit makes no
    character of any of them, and those that have been printed stay."""
    letters = {"a": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(letters, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    smile = [byte + 1 for byte in "🙂".encode()]
    printed = "".join(stream_text(tokenizer, [], [0, *smile, smile[-1], 0, *smile, 0]))
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
    assert done.returncode == 0 and done.stdout.startswith(f"> {PROMPT}\n") and not done.stderr
    assert done.stdout.count(" tokens)\n\n> One day\n") == 1
    lost = run("none.pt", PROMPT)
    assert (lost.returncode, lost.stdout) == (2, "")
    assert lost.stderr == "error: none.pt: there is no such checkpoint\n"


@pytest.fixture
def run_folder(checkpoint, tmp_path):
    """A folder as a run of two phases leaves it, the second of which is not finished."""
    paths = [("dense.pt", True), ("moe_init.pt", False)]
    events = [
        {"event": "checkpoint", "wall_s": 1.0, "path": path, "trained": trained}
        for path, trained in paths
    ]
    (tmp_path / HISTORY_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "dense.pt").write_bytes(checkpoint.read_bytes())
    return tmp_path


def test_a_runs_folder_stands_for_the_last_model_that_it_has_trained(
    run_folder, checkpoint, capsys
):
    main(run_folder, (PROMPT,), length=9, device="cpu")
    taken = capsys.readouterr()
    assert f"{run_folder}/dense.pt" in taken.err
    main(checkpoint, (PROMPT,), length=9, device="cpu")
    assert taken.out == capsys.readouterr().out


@pytest.mark.parametrize(
    "files, reason",
    [
        ({}, f"holds no run (there is no {HISTORY_FILE})"),
        ({"b.pt": "", "a.pt": ""}, "name one of its files (a.pt, b.pt)"),
        ({"config.json": "{}"}, "python -m utils.hf import"),
        ({HISTORY_FILE: '{"event": "run", "wall_s": 0.0}\n'}, "has finished no phase yet"),
    ],
)
def test_a_folder_without_a_model_says_what_is_missing(files, reason, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}.*{re.escape(reason)}"):
        main(tmp_path, (PROMPT,), device="cpu")


def test_every_line_of_a_pipe_is_a_prompt(checkpoint, capsys, monkeypatch):
    def printed(*prompts, lines=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        main(checkpoint, prompts, length=9, device="cpu")
        return capsys.readouterr().out

    assert printed(lines=f"{PROMPT}\n\nOne day\r\nIt was") == printed(PROMPT, "One day", "It was")
    with pytest.raises(InputError, match=re.escape("prompts = () is empty, and standard input")):
        printed(lines="\n")


def test_bytes_in_a_pipe_that_are_no_text_are_one_line_after_the_stories_before(checkpoint):
    command = [sys.executable, "-m", "utils.generate", checkpoint, "--length", "3"]
    lines = PROMPT.encode() + b"\n\xff\n"
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True)
    assert done.returncode == 2 and done.stdout.startswith(f"> {PROMPT}\n".encode())
    assert done.stderr == b"error: prompt = '\\udcff' is not text in UTF-8\n"


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *args):
        pid, self.screen = pytest.importorskip("pty").fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "utils.generate", *map(str, args)])
        self.pid = pid

    def read_to(self, text):
        """Returns what is shown until `text` is, or until the command has ended."""
        shown = b""
        while not shown.endswith(text):
            try:
                part = os.read(self.screen, 1)
            except OSError:  # Linux's word for the end
                part = b""
            if not part:
                break
            shown += part
        return shown.replace(b"\r\n", b"\n").decode()

    def exit_code(self):
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def type(self, keys):
        os.write(self.screen, keys)


def test_in_a_terminal_each_line_is_answered_until_an_empty_one(checkpoint):
    terminal = Terminal(checkpoint, "--length", "5", "--device", "cpu")
    assert "each line is a prompt" in terminal.read_to(b"> ")
    for line in ("A cat", "One day"):
        terminal.type(line.encode() + b"\n")
        answer = terminal.read_to(b"> ")
        assert answer.startswith(f"{line}\n")
        assert re.search(r"\n\((cut off|end of text) .* tokens?\)\n\n> $", answer)
    terminal.type(b"\n")
    assert terminal.read_to(b"never").strip() == ""
    assert terminal.exit_code() == 0


def test_ctrl_d_ends_the_chat_and_a_line_that_cannot_be_a_prompt_does_not(
    model, tokenizer, tmp_path
):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["[PAD]"])
    weights = TrainState.from_model(model).weights
    saved = Checkpoint(CONFIG, weights, tokenizer.to_str(), SpecialTokens((0,)))
    save_checkpoint(tmp_path / "a.pt", saved)
    terminal = Terminal(tmp_path / "a.pt", "--length", "5", "--device", "cpu")
    terminal.read_to(b"> ")
    terminal.type(b"[PAD]\n")
    assert "error: prompt = '[PAD]': token 300" in terminal.read_to(b"> ")
    terminal.type(b"A cat\n")
    assert " tokens)\n" in terminal.read_to(b"> ")
    terminal.type(b"\x04")
    terminal.read_to(b"never")
    assert terminal.exit_code() == 0


def test_ctrl_c_ends_the_chat_with_one_line(checkpoint):
    terminal = Terminal(checkpoint, "--length", "1000000", "--device", "cpu")
    terminal.read_to(b"> ")
    terminal.type(b"A cat\n")
    terminal.read_to(b"A cat\r\n")
    terminal.type(b"\x03")
    *_, last, end = terminal.read_to(b"never").split("\n")
    assert (last, end) == ("stopped by SIGINT; run the same command again", "")
    assert terminal.exit_code() == 128 + signal.SIGINT
