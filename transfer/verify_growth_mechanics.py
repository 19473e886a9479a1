"""Proves the mechanics of growth: prints a table, and exits with 0 only if every law holds.

python transfer/verify_growth_mechanics.py
python transfer/verify_growth_mechanics.py --before A.pt --after B.pt
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run from anywhere, and transfer.py here must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.runtime.cli import parse_call, run_command


def main(before: Path | None = None, after: Path | None = None, unchecked: bool = False) -> None:
    """Grows small random models by every operator and by chains of them, in float64 and float32,
    and trains some of them before and after: growing and training commute, unless a rule is broken.
    Or compares two checkpoints on the probe batch stored in the first.

    Args:
        before: The smaller checkpoint (.pt).
        after: What it has grown into, before training, such as moe_model_init.pt.
        unchecked: Read checkpoints without their checksum, such as torch.save has written again.
    """
    from transfer.proof import prove

    sys.exit(not prove(before, after, unchecked))


if __name__ == "__main__":
    run_command(lambda: parse_call(main, sys.argv[1:], "verify_growth_mechanics.py")())
