"""What attention keeps of the tokens it has read, so that a model reads on without starting again.

    cache = Cache(model.config, rows=1, slots=64, like=model.norm.weight)
    first = model(prompt_BT, cache)  # then `cache` holds the prompt,
    after = model(more_BT, cache)    # and these tokens come after it

Shapes as in model.py, and: S slots. For use without gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from config import ModelConfig


class Past(NamedTuple):
    """One layer's part of a cache, and where the tokens that are being read belong in it."""

    key_BGSK: Tensor
    value_BGSK: Tensor
    place_BT: Tensor
    """The slot of each token, which is its position in its text, int64."""
    seen_B1TS: Tensor
    """Whether a token attends to a slot: to those before its own and to that. S ends with the last
    slot that any token of this pass takes."""

    def extended(self, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Puts these in their places. Returns the keys and values (B, G, S, K) to attend to."""
        row_B1 = torch.arange(len(self.place_BT), device=self.place_BT.device)[:, None]
        end = self.seen_B1TS.shape[-1]
        for kept, new in ((self.key_BGSK, key_BGTK), (self.value_BGSK, value_BGTK)):
            kept[row_B1, :, self.place_BT] = new.transpose(1, 2).to(kept.dtype)
        return self.key_BGSK[:, :, :end], self.value_BGSK[:, :, :end]


class Cache:
    """Keys and values of `rows` texts of up to `slots` tokens each, with `like`'s device and dtype.

    Token t of a text lies in slot t. So texts may differ in length: what pads the shorter ones lies
    ahead of them, where none of their tokens looks, and their next tokens overwrite it.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, like: Tensor):
        shape = rows, config.kv_heads, slots, config.head_size
        self.layers = [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.n_layers)
        ]
        self.slots = slots
        self.lengths = [0] * rows
        """Tokens held of each text. May be lowered, to forget the last ones."""

    def extend(self, length: int) -> tuple[Tensor, list[Past]]:
        """Makes room for `length` more tokens of each text. Returns their places (B, T), and what
        each layer needs to read them. Raises ValueError where they don't fit."""
        end = max(self.lengths) + length
        if end > self.slots:
            raise ValueError(f"{end} tokens do not fit a cache of {self.slots}")
        device = self.layers[0][0].device
        start_B1 = torch.tensor(self.lengths, device=device)[:, None]
        place_BT = start_B1 + torch.arange(length, device=device)
        seen_B1TS = torch.arange(end, device=device) <= place_BT[:, None, :, None]
        self.lengths = [held + length for held in self.lengths]
        return place_BT, [Past(*kept, place_BT, seen_B1TS) for kept in self.layers]

    def keep(self, rows: list[int]) -> None:
        """Drops all texts but these."""
        self.layers = [(key[rows], value[rows]) for key, value in self.layers]
        self.lengths = [self.lengths[row] for row in rows]
