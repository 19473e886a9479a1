"""Exports a checkpoint of this project to transformers' format, and imports a model from it."""

from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

from config import require
from utils.checkpoint.model import Checkpoint, load_checkpoint, save_checkpoint
from utils.hf.config_json import to_hf_config
from utils.hf.model_folder import (
    describe_model,
    model_card,
    new_model_folder,
    write_json,
    write_model,
)
from utils.hf.parity import check_parity
from utils.hf.pretrained import find_pretrained, model_title
from utils.runtime.atomic_io import explain_write_errors
from utils.text.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, read_tokenizer


def export_checkpoint(checkpoint: Path, folder: Path, /, overwrite: bool = False) -> None:
    """Write a checkpoint as a folder that transformers and lm-evaluation-harness load without any
    code of this project: a LlamaForCausalLM, or with experts a MixtralForCausalLM.

    The folder is written only if transformers, reading it, computes the same logits.

    Args:
        checkpoint: A .pt file of a run.
        folder: The folder to write.
        overwrite: Replace a model that is there.

    Raises:
        InputError: if the model cannot be represented, or the folder cannot be written.
        RunStopped: if transformers computes something else.
    """
    require(
        find_spec("transformers") is not None,
        "export checks what it writes with transformers, which is not here: "
        "pip install 'transformers>=5'",
    )
    saved = load_checkpoint(checkpoint)
    hf_config = to_hf_config(saved.config, saved.load_balance_coef)
    hf_config |= {"bos_token_id": None, "eos_token_id": saved.eos_id}
    card = model_card(
        folder.resolve().name,
        saved.config,
        saved.growth_history,
        saved.init_from,
        saved.tokens,
        saved.seed,
        saved.phase_name,
    )
    weight_bytes = sum(weight.nbytes for weight in saved.weights.values())
    with new_model_folder(folder, overwrite, weight_bytes) as part:
        write_model(part, saved.config, saved.weights, hf_config, card)  # empties the weights
        write_tokenizer(part, saved)
        drift = check_parity(part, load_checkpoint(checkpoint))
    architecture, model = hf_config["architectures"][0], describe_model(saved.config)
    print(f"{folder}: {architecture}, {model}, {weight_bytes / 1e9:.3g} GB")
    print(
        f"transformers agrees on {drift.probe_tokens} tokens: logits within "
        f"{drift.max_logit_diff:.1e}, loss {drift.loss_after:.6f} (here {drift.loss_before:.6f}); "
        "generation is the same with and without its cache"
    )


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint's tokenizer, and the settings that generation needs."""
    (folder / TOKENIZER_JSON).write_text(checkpoint.tokenizer, encoding="utf-8")
    eos_token = Tokenizer.from_str(checkpoint.tokenizer).id_to_token(checkpoint.eos_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": eos_token,
        "model_max_length": checkpoint.config.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": checkpoint.eos_id, "pad_token_id": checkpoint.eos_id}
    write_json(folder / TOKENIZER_CONFIG, settings)
    write_json(folder / "generation_config.json", generation)


def import_model(model: str, checkpoint: Path, /, overwrite: bool = False) -> None:
    """Write a Llama or Mixtral in transformers' format as a checkpoint of this project.

    Args:
        model: A folder, or a name on the Hugging Face hub.
        checkpoint: The .pt file to write.
        overwrite: Replace a file that is there.

    Raises:
        InputError: if the model cannot be represented, or the file cannot be written.
    """
    require(overwrite or not checkpoint.exists(), f"{checkpoint} is there: --overwrite replaces it")
    require(checkpoint.parent.is_dir(), f"{checkpoint}: there is no folder {checkpoint.parent}")
    pretrained = find_pretrained(model)
    tokenizer, eos_id = read_tokenizer(model)
    imported = Checkpoint(
        config=pretrained.config,
        weights=pretrained.load_state().weights,
        tokenizer=tokenizer.to_str(),
        eos_id=eos_id,
        load_balance_coef=pretrained.load_balance_coef,
        init_from=model_title(model),
    )
    with explain_write_errors(checkpoint):
        save_checkpoint(checkpoint, imported)
    context = imported.config.seq_len
    print(f"{checkpoint}: {describe_model(imported.config)}, context {context:,}")
