"""Converts models to and from transformers' format, and grows models in it.

python -m utils.hf export CHECKPOINT FOLDER
python -m utils.hf import MODEL CHECKPOINT
python -m utils.hf grow MODEL FOLDER --upcycle 8 --widen 2 --deepen 4
"""

import sys
from pathlib import Path
from typing import Literal

from config import Deepen, Growth, Placement, Upcycle, Widen, require
from utils.runtime.cli import parse_subcommand, run_command


def run_export(
    checkpoint: Path,
    folder: Path,
    /,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
    unchecked: bool = False,
) -> None:
    """Write a checkpoint as a folder that transformers and lm-evaluation-harness load without any
    code of this project: a LlamaForCausalLM, or with experts a MixtralForCausalLM.

    The folder is written only if transformers, reading it, computes the same logits.

    Args:
        checkpoint: A .pt file of a run, or a run's folder, whose last trained model is taken.
        folder: The folder to write.
        dtype: Round the weights to it. None leaves each as it is.
        overwrite: Replace a model that is there.
        unchecked: Read a checkpoint without its checksum, such as torch.save has written again.
    """
    from utils.hf.convert import export_checkpoint

    export_checkpoint(checkpoint, folder, dtype, overwrite, unchecked)


def run_import(
    model: str, checkpoint: Path, /, eos_token: str = "", overwrite: bool = False
) -> None:
    """Write a Llama or Mixtral in transformers' format as a checkpoint of this project.

    Args:
        model: A folder, or a name on the Hugging Face hub.
        checkpoint: The .pt file to write.
        eos_token: The token that ends a text. Empty takes the one that the model's files name.
        overwrite: Replace a file that is there.
    """
    from utils.hf.convert import import_model

    import_model(model, checkpoint, eos_token, overwrite)


def run_grow(
    model: str,
    folder: Path,
    /,
    upcycle: int = 0,
    widen: int = 1,
    deepen: int = 0,
    top_k: int | None = None,
    noise: float | None = None,
    placement: Placement | None = None,
    text: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Grow a Llama or Mixtral in transformers' format without training it, and print how far its
    function moved. It is first upcycled, then widened, then deepened, each only if asked for.

    The weights stay in their dtype, but widening makes them at least float32: below that its noise
    would not cancel.

    Args:
        model: A folder, or a name on the Hugging Face hub.
        folder: The folder to write.
        upcycle: Number of experts that each feed-forward becomes. 0 leaves it dense.
        widen: How many times as wide the model becomes.
        deepen: Number of new layers.
        top_k: Experts that each token visits, at least 2 of several. None takes 2.
        noise: Standard deviation of the noise on widening's copies, relative to each weight's own.
            None takes 0.1.
        placement: Put the new layers between the old ones (interleaved, and None), after the last
            (end), or in the middle.
        text: Compare the models on windows spread over this file instead of over the built-in
            stories.
        seed: Seed of routers, noise and new layers.
        overwrite: Replace a model that is there.
    """
    growths = asked_growths(upcycle, widen, deepen, top_k, noise, placement)
    from utils.hf.grow_folder import grow_folder

    grow_folder(model, folder, growths, text, seed, overwrite)


def asked_growths(
    upcycle: int,
    widen: int,
    deepen: int,
    top_k: int | None,
    noise: float | None,
    placement: Placement | None,
) -> list[Growth]:
    """Returns the operators that the options of `grow` ask for.

    Raises:
        InputError: if they ask for none, or one of them would have no effect.
    """
    for option, value, operator, is_asked in (
        ("top_k", top_k, "upcycle", upcycle),
        ("noise", noise, "widen", widen != 1),
        ("placement", placement, "deepen", deepen),
    ):
        require(
            value is None or bool(is_asked),
            f"{option} = {value} has no effect without --{operator}",
        )
    top_k = Upcycle.top_k if top_k is None else top_k
    noise = Widen.noise if noise is None else noise
    growths: list[Growth] = [Upcycle(upcycle, top_k)] if upcycle else []
    growths += [Widen(widen, noise)] if widen != 1 else []
    growths += [Deepen(deepen, placement or Deepen.placement)] if deepen else []
    require(bool(growths), "nothing to do: --upcycle, --widen or --deepen says how to grow")
    return growths


COMMANDS = {"export": run_export, "import": run_import, "grow": run_grow}


def main(args: list[str]) -> None:
    """Carries out one of the commands."""
    title = (__doc__ or "").splitlines()[0]
    parse_subcommand(COMMANDS, args, "python -m utils.hf", title)()


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
