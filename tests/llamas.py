"""Models as transformers leaves them in a folder: small ones in the shapes of well-known ones."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from utils import stories, tokens

COMMON = {"vocab_size": 300, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0}
SMOLLM2 = COMMON | {
    "hidden_size": 72, "intermediate_size": 192, "num_hidden_layers": 5, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "rope_theta": 100_000.0,
}  # fmt: skip
LLAMA3 = COMMON | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 24,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
MODELS = {"smollm2": SMOLLM2, "llama3": LLAMA3}


def make(folder: Path, config: dict, dtype: torch.dtype = torch.float32) -> Path:
    """Weights large enough for a wrong one to show, no gain at 1, and a tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.1))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.2 * torch.randn_like(weight)
    model.to(dtype).save_pretrained(folder)
    learned = tokens.learn(stories.stories(60), config["vocab_size"])
    (folder / "tokenizer.json").write_text(learned.to_str(), encoding="utf-8")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@torch.no_grad()
def their_logits(folder: Path, length: int = 64) -> torch.Tensor:
    """Of transformers' model, in float32, on random tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(some_tokens(length), use_cache=False).logits


def some_tokens(length: int = 64) -> torch.Tensor:
    return torch.randint(300, (2, length), generator=torch.Generator().manual_seed(1))


def assert_same(logits: torch.Tensor, want: torch.Tensor) -> None:
    """To 1e-5 of the largest."""
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder of each of MODELS."""
    folder = tmp_path_factory.mktemp("llamas")
    return {name: make(folder / name, config) for name, config in MODELS.items()}
