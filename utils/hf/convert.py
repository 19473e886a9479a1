"""Exports a checkpoint of this project to transformers' format, and imports a model from it."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from config import require
from utils.checkpoint.model import Checkpoint, load_checkpoint, save_checkpoint
from utils.checkpoint.run_dir import find_checkpoint
from utils.hf.config_json import to_hf_config
from utils.hf.model_folder import (
    describe_model,
    model_card,
    new_model_folder,
    write_json,
    write_model,
)
from utils.hf.parity import check_parity, require_transformers
from utils.hf.pretrained import find_pretrained, model_title
from utils.runtime.atomic_io import explain_write_errors
from utils.runtime.formatting import format_gb, wrap_lines
from utils.text.special_tokens import GENERATION_CONFIG, TOKENIZER_CONFIG, SpecialTokens
from utils.text.tokenizer import TOKENIZER_JSON, read_tokenizer

FloatName = Literal["float32", "bfloat16", "float16"]


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    /,
    dtype: FloatName | None = None,
    overwrite: bool = False,
    unchecked: bool = False,
) -> None:
    """Write a checkpoint as a folder that transformers and lm-evaluation-harness load without any
    code of this project: a LlamaForCausalLM, or with experts a MixtralForCausalLM.

    The folder is written only if transformers, reading it, computes the same logits.

    Raises:
        InputError: if the model cannot be represented, or the folder cannot be written.
        RunStopped: if transformers computes something else.
    """
    require_transformers()
    checkpoint = find_checkpoint(checkpoint)
    saved = load_in_dtype(checkpoint, dtype, unchecked)
    context = max(saved.config.seq_len, saved.max_seq_len)
    hf_config = to_hf_config(replace(saved.config, seq_len=context), saved.load_balance_coef)
    hf_config |= special_token_ids(saved.special_tokens)
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
        write_tokenizer(part, saved, context)
        drift = check_parity(part, load_in_dtype(checkpoint, dtype, unchecked))
    architecture, model = hf_config["architectures"][0], describe_model(saved.config)
    print(wrap_lines(f"{folder}: {architecture}, {model}, {format_gb(weight_bytes / 1e9)}"))
    agreement = (
        f"transformers agrees on {drift.probe_tokens} tokens: logits within "
        f"{drift.max_logit_diff:.1e}, probe loss {drift.loss_after:.6f} "
        f"(here {drift.loss_before:.6f}); "
        "generation is the same with and without its cache"
    )
    print(wrap_lines(agreement))


def load_in_dtype(checkpoint: Path, dtype: FloatName | None, unchecked: bool) -> Checkpoint:
    """Reads a checkpoint, its weights rounded to `dtype`; None leaves each as it is."""
    saved = load_checkpoint(checkpoint, unchecked)
    if dtype is not None:
        for name, weight in saved.weights.items():
            saved.weights[name] = weight.to(getattr(torch, dtype))
    return saved


def special_token_ids(special_tokens: SpecialTokens) -> dict:
    """Returns the entries of config.json and generation_config.json for special tokens."""
    stop_ids = list(special_tokens.stop_ids)
    eos_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]
    return {"bos_token_id": special_tokens.bos_id, "eos_token_id": eos_id}


def write_tokenizer(folder: Path, checkpoint: Checkpoint, context: int) -> None:
    """Writes a checkpoint's tokenizer, and the settings that generation needs. `context` is the
    longest text in tokens."""
    (folder / TOKENIZER_JSON).write_text(checkpoint.tokenizer, encoding="utf-8")
    tokenizer, special = Tokenizer.from_str(checkpoint.tokenizer), checkpoint.special_tokens
    eos_token = tokenizer.id_to_token(special.eos_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": eos_token,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if special.bos_id is not None:
        settings["bos_token"] = tokenizer.id_to_token(special.bos_id)
    if special.chat_template:
        settings["chat_template"] = special.chat_template
    generation = special_token_ids(special) | {"pad_token_id": special.eos_id}
    write_json(folder / TOKENIZER_CONFIG, settings)
    write_json(folder / GENERATION_CONFIG, generation)


def import_model(
    model: str, checkpoint: Path, /, eos_token: str = "", overwrite: bool = False
) -> None:
    """Write a Llama or Mixtral in transformers' format as a checkpoint of this project.

    Raises:
        InputError: if the model cannot be represented, or the file cannot be written.
    """
    require(overwrite or not checkpoint.exists(), f"{checkpoint} is there: --overwrite replaces it")
    require(checkpoint.parent.is_dir(), f"{checkpoint}: there is no folder {checkpoint.parent}")
    pretrained = find_pretrained(model)
    tokenizer, special_tokens = read_tokenizer(model, eos_token)
    imported = Checkpoint(
        config=pretrained.config,
        weights=pretrained.load_state().weights,
        tokenizer=tokenizer.to_str(),
        special_tokens=special_tokens,
        load_balance_coef=pretrained.load_balance_coef,
        init_from=model_title(model),
    )
    with explain_write_errors(checkpoint):
        save_checkpoint(checkpoint, imported)
    context = imported.config.seq_len
    print(wrap_lines(f"{checkpoint}: {describe_model(imported.config)}, context {context:,}"))
