"""All measurements of a benchmark, one after the other."""

import json
import os
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain

import torch

from utils.benchmark.options import BenchmarkOptions
from utils.benchmark.results import ResultRow, format_results
from utils.benchmark.setup import BenchmarkSetup
from utils.benchmark.startup import measure_startup
from utils.benchmark.steps import measure_steps
from utils.benchmark.transitions import measure_transitions
from utils.checkpoint.run_dir import software_versions
from utils.runtime.atomic_io import atomic_file
from utils.runtime.cpu import reuse_memory_and_kernels
from utils.runtime.device import device_name, dtype_name


def run_benchmark(options: BenchmarkOptions) -> None:
    """Measures what the options ask for. Prints each result as it comes, and tables at the end; the
    JSON file is whole after each result, should a later one never come.

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
    measured = chain(measure_steps(setup), measure_transitions(setup), measure_startup(options))
    rows: dict[str, list[ResultRow]] = {}
    for kind, row in measured:
        rows.setdefault(kind, []).append(row)
        values = {name: value for name, value in row.items() if value is not None}
        facts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{kind}: {', '.join(facts)}", flush=True)
        if options.json is not None:
            content = {"options": asdict(options), "machine": machine, **rows}
            text = json.dumps(content, indent=1, allow_nan=False, default=str)
            with atomic_file(options.json) as file:
                file.write(f"{text}\n".encode())
    print(f"\n{format_results(rows)}")
