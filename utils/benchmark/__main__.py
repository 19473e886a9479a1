"""Speed and memory of training, phase by phase:  python -m utils.benchmark --baselines."""

import sys

from utils.benchmark.options import BenchmarkOptions
from utils.runtime.cli import parse_flags, run_command


def main(args: list[str]) -> None:
    """Measures what the arguments ask for."""
    options = parse_flags(
        BenchmarkOptions,
        args,
        default=BenchmarkOptions(),
        prog="python -m utils.benchmark",
        description=BenchmarkOptions.__doc__ or "",
    )
    from utils.benchmark.suite import run_benchmark

    run_benchmark(options)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
