"""What the benchmark reports is complete, follows from its formulas, and is whole in its JSON
file."""

import gc
import gzip
import json
import math
import re
import signal
import sys
from dataclasses import replace

import pytest
import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

from config import PRESETS, InputError, full, tiny
from models import SLM
from utils.benchmark import steps
from utils.benchmark.baselines import baseline_label, make_baseline_model
from utils.benchmark.options import BenchmarkOptions
from utils.benchmark.results import (
    CAPTIONS,
    TABLES,
    Measurement,
    catch_out_of_memory,
    format_results,
)
from utils.benchmark.roofline import COMPONENTS, DeviceRates, nominal_flops
from utils.benchmark.setup import BenchmarkSetup
from utils.benchmark.startup import time_startup, time_tokenization
from utils.benchmark.steps import EXPECTED_OF_LIMIT, plan_steps
from utils.benchmark.suite import describe_plan, measure_in_turn, run_benchmark
from utils.benchmark.timing import time_in_turn
from utils.runtime.cli import parse_flags, run_command
from utils.runtime.signals import Stopped
from utils.schedule.phases import flops_per_token, resolve_phases

CPU = torch.device("cpu")
H200 = DeviceRates(flops_per_s=790e12, bytes_per_s=4.3e12)
TEXT = "Once upon a time there was a cat and a dog.\n<|endoftext|>\n"


def atom():
    """The tiny preset, smaller still."""
    model = replace(tiny().model, vocab_size=300, d_model=32, n_layers=2, d_ff=48, seq_len=16)
    sizes = {"batch_size": 2, "batch_size_phase3": 1, "batch_size_phase4": 1}
    training = replace(tiny().training, **sizes, probe_sequences=1)
    return replace(tiny(), model=model, training=training)


@pytest.fixture(scope="module", autouse=True)
def preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "atom", atom)
        gc.freeze()  # transformers is large, and each measurement collects
        yield
        gc.unfreeze()


@pytest.fixture
def setup_of():
    """A function that returns the setup on this CPU of some options, those of `atom` by default."""
    return lambda **options: BenchmarkSetup.from_options(
        BenchmarkOptions(**{"preset": "atom", "device": "cpu"} | options)
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The JSON of one benchmark with every kind of measurement that needs no other process."""
    folder = tmp_path_factory.mktemp("benchmark")
    text = folder / "text.txt"
    text.write_text(TEXT * 500)
    options = BenchmarkOptions(
        preset="atom", batches=("default", 2), baselines=True, transitions=True, tokenize=text,
        tokenizer="learned", device="cpu", precision="fp32", repeats=1, warm_up=1,
        json=folder / "report.json",
    )  # fmt: skip
    run_benchmark(options)
    return json.loads(options.json.read_text())


def test_there_is_a_finite_row_for_each_phase_batch_and_model(report):
    rows = [(row["phase"], row["batch"], row["model"]) for row in report["steps"]]
    sizes = {1: [2], 2: [2], 3: [1, 2], 4: [1, 2]}
    names = {1: "Llama", 2: "Mixtral", 3: "Mixtral", 4: "Mixtral"}
    assert rows == [
        (phase, size, model)
        for phase in sizes
        for size in sizes[phase]
        for model in ("this project", f"{names[phase]} fp32", f"{names[phase]} bf16")
    ]
    for row in report["steps"]:
        numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
        memory = numbers.pop("peak_memory_gb")
        assert memory is numbers.pop("mfu") is None and "error" not in row
        assert all(math.isfinite(value) and value >= 0 for value in numbers.values())
        assert math.isclose(row["tokens_per_s"] * row["ms"], 1e3 * row["batch"] * row["context"])
        assert math.isclose(row["of_limit"], row["tokens_per_s"] / row["limit_tokens_per_s"])
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert ("ms_without_data" in row) == (row["model"] == "this project")


def test_the_components_of_our_own_step_are_timed_beside_their_limits(report):
    steps = [row for row in report["steps"] if row["model"] == "this project"]
    for step, row in zip(steps, report["components"], strict=True):
        assert [row[name] for name in ("phase", "batch")] == [step["phase"], step["batch"]]
        for part in COMPONENTS:
            assert math.isclose(row[f"{part}_share"], row[f"{part}_ms"] / step["ms"])
            assert row[f"{part}_ms"] > 0 and row[f"{part}_limit_ms"] > 0


def test_the_rates_of_the_machine_are_of_a_size_that_machines_have(report):
    (rates,) = report["rates"]
    assert rates["nominal_flops_per_s"] is None
    assert 1e8 < rates["flops_per_s"] < 1e14 and 1e7 < rates["bytes_per_s"] < 1e12


def test_mfu_is_of_the_data_sheets_rate_and_not_of_the_measured_one():
    """The step of 64 sequences in phase 1 that docs/performance.md has, on an H100."""
    phase = resolve_phases(full())[0]
    nominal = nominal_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)
    h100 = DeviceRates(flops_per_s=692e12, bytes_per_s=3.01e12, nominal_flops_per_s=nominal)
    shares = h100.utilization(1.002e6 * flops_per_token(phase.config))
    assert shares == pytest.approx({"mfu": 0.400, "of_matrix_rate": 0.572}, abs=5e-4)


@pytest.mark.parametrize(
    "card, dtype",
    [
        ("NVIDIA H100 80GB HBM3", torch.float32),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),
        ("cpu", torch.bfloat16),
    ],
)
def test_there_is_no_mfu_where_the_nominal_rate_is_not_known(card, dtype):
    rates = DeviceRates(1e12, 1e12, nominal_flops(card, dtype))
    assert rates.utilization(5e11) == {"mfu": None, "of_matrix_rate": 0.5}


def test_the_limits_of_the_components_add_up_to_that_of_the_step():
    """They do but for the gains of norms, whose products no component has."""
    for changes in ({}, {"tie_embeddings": False}, {"position_embedding": "learned"}):
        run = replace(full(), model=replace(full().model, **changes))
        for phase in resolve_phases(run):
            parts = H200.component_limits_s(phase.config, 2048)
            limit = H200.step_limit_s(phase.config, 2048)
            assert sum(parts.values()) == pytest.approx(limit, rel=1e-3)


def test_the_limit_of_each_component_is_that_of_its_products_and_traffic():
    """Phase 2 of the full preset at 8 x 256, worked out by hand."""
    config, tokens = resolve_phases(full())[1].config, 2048
    width, ffn, layers = 512, 1408, 12
    products = {
        "head": width * 50257,
        "attention": layers * (4 * width**2 + width * 256),
        "ffn": layers * (2 * 3 * width * ffn + 8 * width),
    }
    weights = {"head": width * 50257, "attention": layers * 4 * width**2}
    weights["ffn"] = layers * (8 * 3 * width * ffn + 8 * width)
    limits = H200.component_limits_s(config, tokens)
    for part, count in products.items():
        limit = 6 * count * tokens / 790e12 + 8 * weights[part] / 4.3e12
        assert limits[part] == pytest.approx(limit)
    rest = 38 * config.num_params - 8 * sum(weights.values())
    assert limits["optimizer"] == pytest.approx(rest / 4.3e12)


def test_the_limit_of_a_step_is_that_of_the_formula():
    """Thousands of tokens per second that an H200 allows the full preset, worked out apart, with a
    copy rate that was rounded."""
    known = {8: (1300, 581, None, None), 2: (None, None, 56, None), 1: (None, None, None, 24)}
    known[64] = (1890, 1230, 355, 293)
    for batch, limits in known.items():
        for phase, limit in zip(resolve_phases(full()), limits, strict=True):
            tokens = batch * phase.config.seq_len
            speed = tokens / H200.step_limit_s(phase.config, tokens) / 1e3
            assert limit is None or speed == pytest.approx(limit, rel=0.05)


def test_each_growth_is_timed_and_makes_weights_and_two_moments(report):
    assert [row["name"] for row in report["transitions"]] == [
        "dense -> moe", "moe -> wide", "wide -> deep",
    ]  # fmt: skip
    for row, phase in zip(report["transitions"], resolve_phases(atom())[1:], strict=True):
        assert min(row["bare_s"], row["checked_s"], row["copy_s"]) > 0
        # New parameters, those of routers and new blocks, come without moments.
        assert 4e-9 < row["made_gb"] / phase.config.num_params <= 12.1e-9


def test_tokens_are_made_at_some_speed_and_the_machine_is_named(report):
    (row,) = report["tokenize"]
    assert row["mb_per_s"] > 0 and row["open_s"] > 0 and row["tokens"] > 500
    assert report["machine"]["device"] == "cpu" and report["machine"]["torch"]
    assert report["options"]["preset"] == "atom"


def test_a_baseline_has_as_many_parameters_as_ours_in_the_precision_that_is_asked_for():
    for phase in resolve_phases(atom()):
        for dtype in (torch.float32, torch.bfloat16):
            weights = list(make_baseline_model(phase.config, 0.01, dtype).parameters())
            assert sum(weight.numel() for weight in weights) == phase.config.num_params
            assert {weight.dtype for weight in weights} == {dtype}
        ours = sum(weight.numel() for weight in SLM(phase.config).parameters())
        assert ours == phase.config.num_params


def test_the_text_in_a_compressed_file_is_what_counts(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(TEXT.encode() * 2000))
    assert time_tokenization(path, "learned")["mb"] == pytest.approx(len(TEXT) * 2000 / 1e6)


def test_functions_are_timed_in_turn_and_the_warm_up_does_not_count():
    order = []
    functions = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = time_in_turn(functions, CPU, repeats=2, warm_up=1)
    assert [len(each) for each in seconds] == [2, 2]
    assert order == ["a", "b"] * 3


def test_columns_that_no_row_has_are_left_out_of_a_table():
    rows = {"startup": [{"preset": "tiny"}], "tokenize": [{"file": "a", "mb": 1.0}, {"file": "b"}]}
    tokenize, startup = format_results(rows).split("\n\n")
    assert tokenize.splitlines() == [CAPTIONS["tokenize"], "file   MB", "a     1.0", "b       -"]
    assert startup.splitlines() == [CAPTIONS["startup"], "preset", "tiny  "]


def test_every_table_fits_a_terminal_and_keeps_what_is_needed_most():
    label = baseline_label(full().model, torch.bfloat16, torch.float32, "reduce-overhead")
    row = {c: 0.123 if str(form).endswith("%") else 9_999_999 for _, c, form in TABLES["steps"]}
    row |= {"name": "single", "model": label, "batch": 1024, "ms": 99_999.0}
    parts = {f"{part}_ms": 99_999.0 for part in COMPONENTS}
    parts |= {f"{part}_share": 0.99 for part in COMPONENTS} | {"name": "single", "batch": 1024}
    growth = {c: 1234.5 for _, c, _ in TABLES["transitions"]} | {"name": "dense -> moe"}
    text = {c: 123_456_789 for _, c, _ in TABLES["tokenize"]} | {"file": "a" * 255}
    failed = [{"name": "deep", "batch": 64, "model": label, "file": "b", "error": "out of memory"}]
    rows = {"steps": [row], "components": [parts], "transitions": [growth], "tokenize": [text]}
    for more in ([], failed):
        lines = format_results({kind: each + more for kind, each in rows.items()}).splitlines()
        assert max(map(len, lines)) <= 80
        assert any(label in line and "9,999,999" in line for line in lines)
        assert sum("out of memory" in line for line in lines) == (4 if more else 0)
    assert max(map(len, CAPTIONS.values())) <= 80


def test_what_takes_minutes_is_said_with_how_to_have_less():
    assert describe_plan(1, 0.0) == "1 measurement" and describe_plan(8, 59.0) == "8 measurements"
    long = describe_plan(24, 3 * 3600.0)
    assert long.startswith("24 measurements, about 3 h 0 min; less: --phases 1 --batches 1")
    assert len(describe_plan(240, 99 * 3600.0)) <= 80


def test_the_expected_time_is_that_of_all_runs_and_follows_from_the_options(setup_of):
    def expected(**options):
        return sum(m.expected_s for m in plan_steps(setup_of(**options), H200))

    phase = resolve_phases(atom())[0]
    limit = H200.step_limit_s(phase.config, phase.tokens_per_step)
    one = expected(phases=(1,), batches=("default",), repeats=4, warm_up=1)
    assert one == pytest.approx(3 * 5 * limit / EXPECTED_OF_LIMIT)
    assert expected(phases=(1,), batches=("default",), repeats=9, warm_up=1) == 2 * one
    assert expected(phases=(1,), batches=("default",), repeats=4, warm_up=1, baselines=True) > one
    assert expected(repeats=4, warm_up=1) > 4 * one


def test_a_cpu_measures_the_small_preset_unless_another_is_asked_for(setup_of):
    assert setup_of(preset="auto").run == (setup_of(preset="tiny").run)
    assert setup_of(preset="full").run.model.d_model == full().model.d_model
    assert (
        BenchmarkOptions().resolve_preset("cuda")
        == BenchmarkOptions().resolve_preset("mps")
        == "full"
    )


def test_progress_names_the_measurement_that_is_at_work(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    plan = [Measurement(name, lambda: iter([("steps", {})])) for name in ("first", "second")]
    assert list(measure_in_turn(plan)) == 2 * [("steps", {})]
    out, err = capsys.readouterr()
    assert out == "2 measurements\n"
    assert "first" in err and "second" in err and "2/2" in err
    assert max(map(len, re.split(r"[\r\n]", err))) <= 80


def test_who_stops_a_benchmark_has_the_tables_of_what_was_measured(monkeypatch, capsys):
    def stop(*args):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(steps, "time_components", stop)
    options = BenchmarkOptions("atom", (1,), ("default",), device="cpu", repeats=1, warm_up=1)
    with pytest.raises(Stopped):
        run_benchmark(options)
    out = capsys.readouterr().out
    assert CAPTIONS["steps"] in out and CAPTIONS["components"] not in out


def run_out_on_the_cpu():
    torch.empty(1 << 60)


def run_out_on_the_gpu():
    raise torch.OutOfMemoryError("no")


@pytest.mark.parametrize("run_out", [run_out_on_the_cpu, run_out_on_the_gpu])
def test_a_row_says_where_memory_ran_out(run_out):
    row = {}
    with catch_out_of_memory(row):
        run_out()
    assert row == {"error": "out of memory"}


def test_another_error_than_that_of_memory_is_not_taken_for_it():
    with pytest.raises(RuntimeError, match="size of tensor"), catch_out_of_memory({}):
        torch.ones(2) + torch.ones(3)


def huge():
    """The atom preset, with a second phase that no machine has the memory for."""
    training = replace(
        atom().training, upcycle=replace(atom().training.upcycle, num_experts=1 << 40)
    )
    return replace(atom(), training=training)


@pytest.mark.parametrize("known, error", [(False, "out of memory"), (True, "needs .* GB")])
def test_what_needs_too_much_memory_says_so_and_the_rest_goes_on(
    known, error, monkeypatch, tmp_path, capsys
):
    """A CPU's memory is looked at before, so that the system does not end the process."""
    monkeypatch.setitem(PRESETS, "huge", huge)
    monkeypatch.setattr(steps, "free_memory_gb", lambda device: 64.0 if known else None)
    out = tmp_path / "report.json"
    run_benchmark(
        BenchmarkOptions(
            "huge",
            (1, 2, 3),
            (1,),
            transitions=True,
            device="cpu",
            precision="fp32",
            repeats=1,
            json=out,
        )
    )
    report = json.loads(out.read_text())
    first, *others = [row.get("error") for row in report["steps"]]
    others += [row.get("error") for row in report["transitions"]]
    assert first is None and len(others) == 4 and all(re.fullmatch(error, o) for o in others)
    assert len(report["components"]) == 1
    start, _, *tables = capsys.readouterr().out.split("\n\n")
    assert start.startswith("cpu, float32") and "preset huge\n5 measurements" in start
    assert ("about" in start) == (not known), "what does not fit takes no time"
    assert len(re.findall(error, "\n".join(tables))) == 4
    assert all(part in "\n".join(tables) for part in COMPONENTS)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--preset tinny", "preset = tinny is not there, only auto, full, tiny"),
        ("--phases 1 9", "phases = (1, 9)"),
        ("--batches default 0", "batches = ('default', 0)"),
        ("--batches few", "few"),
        ("--repeats 0", "repeats = 0"),
        ("--warm-up -1", "warm_up = -1"),
        ("--tokenize none.txt", "tokenize = none.txt"),
        ("--json none/report.json", "json = none/report.json"),
        ("--json README.md", "json = README.md is no .json file"),
        ("--tokenize tests", "tokenize = tests is not a file"),
        ("--no-steps", "steps = False leaves nothing to measure"),
        ("--device tpu", "device = tpu is not there"),
        ("--phaes 1", "perhaps you meant --phases"),
        ("--baseline-compile fast", "fast"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(args, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")

    def command():
        run_benchmark(parse_flags(BenchmarkOptions, args.split(), BenchmarkOptions(), "", ""))

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: ") and message in err


def test_the_start_of_a_run_is_timed_to_its_first_step(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 800)
    flags = f"--data.source {text} --data.tokenizer learned --model.d-model 32 --model.n-layers 1"
    flags += " --model.seq-len 16 --training.eval-tokens 64 --device cpu"
    assert time_startup("tiny", flags.split()) > 0.1


def test_a_run_that_does_not_start_says_why():
    with pytest.raises(InputError, match=r"startup: error: .*seed = -1"):
        time_startup("tiny", ["--seed", "-1"])
