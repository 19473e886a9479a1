"""Converts models to and from transformers' format, and grows models in it.

python -m utils.hf export CHECKPOINT FOLDER
python -m utils.hf import MODEL CHECKPOINT
python -m utils.hf grow MODEL FOLDER --upcycle 8 --widen 2 --deepen 4
"""

import tyro

from utils.hf.convert import export_checkpoint, import_model
from utils.hf.grow_folder import grow_folder
from utils.runtime.cli import run_command

if __name__ == "__main__":
    commands = {"export": export_checkpoint, "import": import_model, "grow": grow_folder}
    run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m utils.hf", description=(__doc__ or "").splitlines()[0]
        )
    )
