"""Small models in the shapes of well-known ones, saved by transformers itself."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from utils.text.builtin.stories import builtin_stories
from utils.text.tokenizer import learn_tokenizer

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
HF_MODELS = {"smollm2": SMOLLM2, "llama3": LLAMA3}


def save_hf_model(folder: Path, config: dict, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a random Llama with a tokenizer, and returns the folder. Its weights are so large that
    a wrong one shows, and no gain is 1."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.1))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.2 * torch.randn_like(weight)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    tokenizer = learn_tokenizer(builtin_stories(60), config["vocab_size"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_instruct(folder: Path) -> Path:
    """Makes a saved model one that talks: texts begin with `<s>`, which its tokenizer puts there,
    and its turns end with `<|im_end|>`, at which, or at `<|endoftext|>`, it stops. Returns it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for token_id, name in ((200, "<s>"), (201, "<|im_end|>")):  # in place of rare bytes
        old = next(token for token, i in vocabulary.items() if i == token_id)
        vocabulary[name] = vocabulary.pop(old)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<s>", "<|im_end|>"])
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 200)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"bos_token_id": 200, "eos_token_id": [201, 0]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def random_tokens(length: int = 64) -> Tensor:
    """Returns tokens (2, length) that every model here knows."""
    return torch.randint(300, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hf_logits(folder: Path, length: int = 64) -> Tensor:
    """Returns what transformers, reading `folder` in float32, computes for `random_tokens`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(random_tokens(length), use_cache=False).logits


def assert_same_logits(logits: Tensor, expected: Tensor) -> None:
    """Fails where a logit is off by more than 1e-5 of the largest."""
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
