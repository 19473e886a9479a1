"""Speed and memory of training, phase by phase:  python -m utils.benchmark --baselines."""

import sys

from utils.benchmark.options import BenchmarkOptions
from utils.benchmark.suite import run_benchmark
from utils.runtime.cli import parse_flags, run_command

if __name__ == "__main__":
    run_command(
        lambda: run_benchmark(
            parse_flags(
                BenchmarkOptions,
                sys.argv[1:],
                default=BenchmarkOptions(),
                prog="python -m utils.benchmark",
                description=BenchmarkOptions.__doc__ or "",
            )
        )
    )
