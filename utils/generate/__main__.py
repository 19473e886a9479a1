"""Writes stories with a trained model:

python -m utils.generate runs/full "Once upon a time" "One day"
python -m utils.generate runs/full                                  (prompts are then typed)
"""

import sys
from pathlib import Path

from utils.generate.sampling import Sampling
from utils.runtime.cli import parse_call, run_command


def main(
    checkpoint: Path,
    prompts: tuple[str, ...],
    /,
    length: int = 200,
    sampling: Sampling = Sampling(),
    device: str = "auto",
    unchecked: bool = False,
) -> None:
    """Prints the stories that a model makes of prompts, while it writes them. Each begins with its
    prompt behind "> " and ends with a line that says whether the model ended the text or `length`
    did.

    Args:
        checkpoint: The .pt file of a run, or a run's folder, whose last trained model is taken.
        prompts: How each story begins. Without any, each line typed or piped in is one; an empty
            line or Ctrl-D ends what is typed.
        length: The most tokens to add to each prompt. A text longer than the model's context takes
            long, and only its end is seen.
        sampling: How the next token is drawn.
        device: Where to compute: auto (CUDA, then MPS, then CPU), cuda, cuda:1, mps or cpu. Nothing
            has been run on Apple's MPS yet.
        unchecked: Read a checkpoint without its checksum, such as torch.save has written again.
    """
    from utils.generate.stories import print_stories

    print_stories(checkpoint, prompts, length, sampling, device, unchecked)


if __name__ == "__main__":
    run_command(lambda: parse_call(main, sys.argv[1:], "python -m utils.generate")())
