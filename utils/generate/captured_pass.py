"""One more token of each text as a CUDA graph: what a GPU does for so few tokens takes less time
than its launches take the host."""

import torch
from torch import Tensor

from models import SLM, KVCache
from utils.optim.cuda_graph import capture_graph, capture_stream

MIN_CAPTURED_TOKENS = 10
"""Tokens to come from which a capture pays: it takes as long as some passes that are launched one
by one."""


def is_worth_capturing(model: SLM, cache: KVCache, texts: list[list[int]], tokens: int) -> bool:
    """Whether a CapturedPass serves to add `tokens` to each of `texts`: on a GPU, where there is
    room in the cache for the one token of each text that it does not hold. (Experts in float32 ask
    the host for their bounds.)"""
    weight = model.norm.weight
    is_capturable = weight.device.type == "cuda" and (
        weight.dtype == torch.bfloat16 or not model.config.num_experts
    )
    if not is_capturable or tokens < MIN_CAPTURED_TOKENS:
        return False
    reads_one = all(len(text) == n + 1 for text, n in zip(texts, cache.lengths, strict=True))
    return reads_one and max(map(len, texts)) <= cache.slots


class CapturedPass:
    """Reads one more token of each text that `cache` holds, whose rows stay as they are."""

    def __init__(self, model: SLM, cache: KVCache):
        """Captures the pass; there must be room in `cache` for a token more of each text."""
        device = model.norm.weight.device
        self.cache, self.graph = cache, torch.cuda.CUDAGraph()
        self.token_B1 = torch.zeros(len(cache.lengths), 1, dtype=torch.int64, device=device)
        # A slot that the first pass overwrites.
        self.next_B1 = torch.tensor(cache.lengths, device=device)[:, None]
        lengths, cache.next_B1, stream = cache.lengths, self.next_B1, capture_stream(device.index)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            model(self.token_B1, cache)  # a warm-up: libraries make their workspaces
            cache.lengths = lengths
            with capture_graph(self.graph, stream):
                self.logits_BV = model(self.token_B1, cache).logits[:, -1]
        torch.cuda.current_stream(device).wait_stream(stream)
        cache.lengths, cache.next_B1 = lengths, None

    def __call__(self, texts: list[list[int]]) -> Tensor:
        """Returns the logits (B, V) of the token after each text, of which the cache holds all but
        the last token."""
        self.cache.lengths = [len(text) for text in texts]
        read = torch.tensor([[text[-1], len(text) - 1] for text in texts])
        read = read.to(self.token_B1.device, non_blocking=True)
        self.token_B1.copy_(read[:, :1])
        self.next_B1.copy_(read[:, 1:])
        self.graph.replay()
        return self.logits_BV
