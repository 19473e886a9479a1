"""All measurements of a benchmark, one after the other."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec

import torch
from tqdm import tqdm

from utils.benchmark.options import BenchmarkOptions
from utils.benchmark.results import Measurement, ResultRow, format_results
from utils.benchmark.setup import BenchmarkSetup
from utils.benchmark.startup import plan_startup
from utils.benchmark.steps import measure_rates, plan_steps
from utils.benchmark.transitions import plan_transitions
from utils.checkpoint.run_dir import software_versions
from utils.runtime.atomic_io import atomic_file
from utils.runtime.cpu import reuse_memory_and_kernels
from utils.runtime.device import device_name, dtype_name
from utils.runtime.formatting import LINE_WIDTH, count_noun, format_duration

LONG_S = 60.0
"""Seconds from which on it is said how long it takes, and how to measure less."""


def run_benchmark(options: BenchmarkOptions) -> None:
    """Measures what the options ask for. Says what that is and shows how far it is, and prints
    tables at the end, or of what there is if it is stopped. The JSON file is whole after each
    result, should a later one never come.

    Raises:
        InputError: for a device or a text that cannot be used.
    """
    if options.steps or options.transitions:
        reuse_memory_and_kernels()
    setup = BenchmarkSetup.from_options(options)
    machine = {
        "device": device_name(setup.device),
        "dtype": dtype_name(setup.dtype),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda if setup.device.type == "cuda" else None,
        **software_versions(),
        **{p: version(p) if find_spec(p) else None for p in ("transformers", "triton")},
    }
    print(
        f"{machine['device']}, {machine['dtype']}, threads {machine['threads']}; "
        f"preset {setup.options.preset}",
        flush=True,
    )
    rates = measure_rates(setup)
    rows: dict[str, list[ResultRow]] = {} if rates is None else {"rates": [rates._asdict()]}
    plan = [] if rates is None else list(plan_steps(setup, rates))
    plan += [*plan_transitions(setup), *plan_startup(setup.options)]
    try:
        for kind, row in measure_in_turn(plan):
            rows.setdefault(kind, []).append(row)
            if options.json is not None:
                content = {"options": asdict(setup.options), "machine": machine, **rows}
                text = json.dumps(content, indent=1, allow_nan=False, default=str)
                with atomic_file(options.json) as file:
                    file.write(f"{text}\n".encode())
    finally:
        if rows:
            print(f"\n{format_results(rows)}")


def measure_in_turn(plan: list[Measurement]) -> Iterator[tuple[str, ResultRow]]:
    """Yields each result with its kind. Says how long all will take, and shows which measurement is
    at work."""
    expected_s = sum(measurement.expected_s for measurement in plan)
    print(describe_plan(len(plan), expected_s), flush=True)
    form = "{n}/{total} |{bar}| {elapsed}  {desc}"
    with tqdm(plan, bar_format=form, ncols=LINE_WIDTH, disable=None) as bar:
        for measurement in bar:
            bar.set_description_str(measurement.name)
            yield from measurement.measure()


def describe_plan(count: int, expected_s: float) -> str:
    """Returns how many measurements there are, how long their steps will take and, if that is long,
    how to have fewer."""
    line = count_noun(count, "measurement")
    if expected_s < LONG_S:
        return line
    duration = format_duration(expected_s)
    return f"{line}, about {duration}; less: --phases 1 --batches 1 --repeats 5"
