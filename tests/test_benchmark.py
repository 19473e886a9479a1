"""What the benchmark says is complete, follows from its formulas, and is whole in its JSON file."""

import gc
import gzip
import json
import math
from dataclasses import replace

import pytest
import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

from config import PRESETS, InputError, full, tiny
from models import SLM
from utils import benchmark
from utils.benchmark import Benchmark, main
from utils.cli import flags, run_command
from utils.occasions import time_startup, time_tokens
from utils.peers import peer_model
from utils.schedule import stages
from utils.timing import PARTS, Rates, measure_rates, timed

CPU = torch.device("cpu")
H200 = Rates(flops_per_s=790e12, bytes_per_s=4.3e12)


def atom():
    """tiny, smaller still."""
    model = replace(tiny().model, vocab_size=300, d_model=32, n_layers=2, d_ff=48, seq_len=16)
    sizes = {"batch_size": 2, "batch_size_phase3": 1, "batch_size_phase4": 1}
    training = replace(tiny().training, **sizes, probe_sequences=1)
    return replace(tiny(), model=model, training=training)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The JSON and what was printed, of one run of every kind of measurement in this process."""
    folder = tmp_path_factory.mktemp("benchmark")
    text = folder / "text.txt"
    text.write_text("Once upon a time there was a cat.\n<|endoftext|>\n" * 500)
    options = Benchmark(
        preset="atom", batches=("default", 2), peer=True, transitions=True, tokenise=text,
        tokenizer="learned", device="cpu", precision="fp32", repeats=1, warm_up=1,
        json=folder / "found.json",
    )  # fmt: skip
    main(options)
    return json.loads(options.json.read_text())


@pytest.fixture(scope="module", autouse=True)
def preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "atom", atom)
        patch.setattr(benchmark, "measure_rates", lambda *_: Rates(1e11, 1e10))
        gc.freeze()  # transformers is large, and each measurement collects
        yield
        gc.unfreeze()


def test_there_is_a_row_for_each_phase_batch_and_model_all_of_it_finite(measured):
    rows = [(row["phase"], row["batch"], row["model"]) for row in measured["steps"]]
    sizes = {1: [2], 2: [2], 3: [1, 2], 4: [1, 2]}
    names = {1: "Llama", 2: "Mixtral", 3: "Mixtral", 4: "Mixtral"}
    assert rows == [
        (phase, size, model)
        for phase in sizes
        for size in sizes[phase]
        for model in ("this project", f"{names[phase]} fp32", f"{names[phase]} bf16")
    ]
    for row in measured["steps"]:
        numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
        memory = numbers.pop("peak_memory_gb")
        assert memory is None and "error" not in row
        assert all(math.isfinite(value) and value >= 0 for value in numbers.values())
        assert math.isclose(row["tokens_per_s"] * row["ms"], 1e3 * row["batch"] * row["context"])
        assert math.isclose(row["of_limit"], row["tokens_per_s"] / row["limit_tokens_per_s"])
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert ("ms_without_data" in row) == (row["model"] == "this project")


def test_the_parts_of_our_own_step_are_timed_beside_their_parts_of_the_limit(measured):
    ours = [row for row in measured["steps"] if row["model"] == "this project"]
    for step, row in zip(ours, measured["parts"], strict=True):
        assert [row[name] for name in ("phase", "batch")] == [step["phase"], step["batch"]]
        for part in PARTS:
            assert math.isclose(row[f"{part}_share"], row[f"{part}_ms"] / step["ms"])
            assert row[f"{part}_ms"] > 0 and row[f"{part}_limit_ms"] > 0


def test_the_limits_of_the_parts_add_up_to_that_of_the_step():
    """But for the gains of norms, whose products no part has."""
    for changes in ({}, {"tied": False}, {"position": "learned"}):
        run = replace(full(), model=replace(full().model, **changes))
        for stage in stages(run):
            parts = H200.parts_s(stage.config, 2048)
            assert sum(parts.values()) == pytest.approx(H200.limit_s(stage.config, 2048), rel=1e-3)


def test_the_limit_of_each_part_is_that_of_its_products_and_traffic():
    """Phase 2 of the full preset at 8 x 256, worked out by hand."""
    config, tokens = stages(full())[1].config, 2048
    width, ffn, layers = 512, 1408, 12
    products = {
        "head": width * 50257,
        "attention": layers * (4 * width**2 + width * 256),
        "ffn": layers * (2 * 3 * width * ffn + 8 * width),
    }
    held = {"head": width * 50257, "attention": layers * 4 * width**2}
    held["ffn"] = layers * (8 * 3 * width * ffn + 8 * width)
    found = H200.parts_s(config, tokens)
    for part, count in products.items():
        limit = 6 * count * tokens / 790e12 + 8 * held[part] / 4.3e12
        assert found[part] == pytest.approx(limit)
    rest = 38 * config.num_params - 8 * sum(held.values())
    assert found["optimizer"] == pytest.approx(rest / 4.3e12)


def test_each_transition_is_timed_and_makes_weights_and_two_moments(measured):
    assert [row["name"] for row in measured["transitions"]] == [
        "dense -> moe", "moe -> wide", "wide -> deep",
    ]  # fmt: skip
    for row, stage in zip(measured["transitions"], stages(atom())[1:], strict=True):
        assert min(row["bare_s"], row["checked_s"], row["copy_s"]) > 0
        # What is fresh, routers and new blocks, comes without moments.
        assert 4e-9 < row["made_gb"] / stage.config.num_params <= 12.1e-9


def test_tokens_are_made_at_some_speed_and_the_machine_is_named(measured):
    (row,) = measured["tokenise"]
    assert row["mb_per_s"] > 0 and row["open_s"] > 0 and row["tokens"] > 500
    assert measured["machine"]["device"] == "cpu" and measured["machine"]["torch"]
    assert measured["options"]["preset"] == "atom"


def test_the_limit_is_that_of_the_formula():
    """Thousands of tokens per second that an H200 allows the full preset, worked out apart, with a
    copy rate that was rounded."""
    known = {8: (1300, 581, None, None), 2: (None, None, 56, None), 1: (None, None, None, 24)}
    known[64] = (1890, 1230, 355, 293)
    for batch, limits in known.items():
        for stage, limit in zip(stages(full()), limits, strict=True):
            tokens = batch * stage.config.seq_len
            found = tokens / H200.limit_s(stage.config, tokens) / 1e3
            assert limit is None or found == pytest.approx(limit, rel=0.05)


def test_a_peer_has_as_many_parameters_as_ours():
    for stage in stages(atom()):
        theirs = sum(weight.numel() for weight in peer_model(stage.config).parameters())
        assert theirs == stage.config.num_params
        assert theirs == sum(weight.numel() for weight in SLM(stage.config).parameters())


def test_another_error_than_that_of_memory_is_not_taken_for_it():
    with pytest.raises(RuntimeError, match="size of tensor"):
        try:
            torch.ones(2) + torch.ones(3)
        except RuntimeError as error:
            benchmark.no_memory(error)


def test_the_text_in_a_compressed_file_is_what_counts(tmp_path):
    text = "Once upon a time there was a cat.\n<|endoftext|>\n" * 2000
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    found = time_tokens(tmp_path / "text.txt.gz", "learned")
    assert found["mb"] == pytest.approx(len(text) / 1e6)


def test_the_rates_of_the_machine_are_those_of_a_product_and_a_copy():
    """Of this one, within what any machine does."""
    found = measure_rates(CPU, torch.float32, repeats=1, warm_up=1, small=True)
    assert 1e9 < found.flops_per_s < 1e14 and 1e8 < found.bytes_per_s < 1e12
    a = torch.randn(1024, 1024)
    (seconds,) = timed([lambda: a @ a], CPU, repeats=5, warm_up=2)
    assert found.flops_per_s == pytest.approx(2 * 1024**3 / min(seconds), rel=0.9)


def test_works_are_timed_in_turn_and_the_warm_up_does_not_count(monkeypatch):
    ticks = iter([0, 9, 10, 11, 20, 23, 30, 37])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    calls = []
    works = [lambda: calls.append("a"), lambda: calls.append("b")]
    assert timed(works, CPU, repeats=2, warm_up=1) == [[9, 3], [1, 7]]
    assert calls == ["a", "b"] * 3


def too_large():
    torch.empty(1 << 60)


def none_on_the_gpu():
    raise torch.OutOfMemoryError("no")


@pytest.mark.parametrize("run_out", [too_large, none_on_the_gpu])
def test_what_needs_too_much_memory_says_so_in_its_row_and_the_rest_goes_on(
    run_out, monkeypatch, tmp_path, capsys
):
    make = benchmark.training

    def training(stage, *others):
        if stage.number == 1:
            run_out()
        return make(stage, *others)

    monkeypatch.setattr(benchmark, "training", training)
    out = tmp_path / "found.json"
    main(Benchmark("atom", (1, 2), (1,), transitions=True, device="cpu", repeats=1, json=out))
    found = json.loads(out.read_text())
    assert [row.get("error") for row in found["steps"]] == ["out of memory", None]
    assert [row.get("error") for row in found["transitions"]] == ["out of memory"]
    lines, _, steps, parts, _ = capsys.readouterr().out.split("\n\n")
    assert lines.count("\n") == 4  # each as it comes
    assert "out of memory" in steps and all(name in parts for name in PARTS)


@pytest.mark.parametrize(
    "args, says",
    [
        ("--preset tinny", "preset = tinny is not there, only full, tiny"),
        ("--phases 1 9", "phases = 9"),
        ("--batches default 0", "batches = 0"),
        ("--batches few", "few"),
        ("--repeats 0", "repeats = 0"),
        ("--warm-up -1", "warm_up = -1"),
        ("--tokenise none.txt", "tokenise = none.txt"),
        ("--json none/found.json", "json = none/found.json"),
        ("--json README.md", "json = README.md is no .json file"),
        ("--tokenise tests", "tokenise = tests is not a file"),
        ("--no-steps", "steps = False leaves nothing to measure"),
        ("--device tpu", "device = tpu is not there"),
        ("--phaes 1", "perhaps you meant --phases"),
        ("--peer-compile fast", "fast"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(args, says, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as left:
        run_command(lambda: main(flags(Benchmark, args.split(), Benchmark(), "benchmark", "")))
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: ") and says in err


def test_the_start_of_a_run_is_timed_to_its_first_step_or_says_what_is_wrong(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat and a dog.\n<|endoftext|>\n" * 800)
    args = f"--data.source {text} --data.tokenizer learned --model.d-model 32 --model.n-layers 1"
    args += " --model.seq-len 16 --training.eval-tokens 64 --device cpu"
    assert 0.1 < time_startup("tiny", args.split()) < 60
    with pytest.raises(InputError, match=r"startup: error: .*seed = -1"):
        time_startup("tiny", ["--seed", "-1"])
