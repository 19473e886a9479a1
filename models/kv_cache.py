"""Keys and values of the tokens that attention has read, so that generation reads each token once.

    kv_cache = KVCache(model.config, rows=1, slots=64, like=model.norm.weight)
    first = model(prompt_BT, kv_cache)   # the cache now holds the prompt,
    after = model(more_BT, kv_cache)     # and these tokens follow it

Shapes are as in model.py, and S stands for slots. The cache is for use without gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from config import ModelConfig


class LayerKV(NamedTuple):
    """One layer's keys and values, and where the tokens that are being read belong among them."""

    key_BGSK: Tensor
    value_BGSK: Tensor
    row_B1: Tensor
    """Index of each text, int64."""
    position_BT: Tensor
    """Slot of each token that is being read, which is its position in its text, int64."""
    mask_B1TS: Tensor
    """Whether a token attends to a slot: to its own and all before it. S ends with the last slot
    that any token of this pass takes."""

    def append(self, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values. Returns all keys and values (B, G, S, K) to attend to."""
        end = self.mask_B1TS.shape[-1]
        for stored, new in ((self.key_BGSK, key_BGTK), (self.value_BGSK, value_BGTK)):
            stored[self.row_B1, :, self.position_BT] = new.transpose(1, 2).to(stored.dtype)
        return self.key_BGSK[:, :, :end], self.value_BGSK[:, :, :end]


class KVCache:
    """Keys and values of `rows` texts of up to `slots` tokens each, with `like`'s device and dtype.

    Token t of a text lies in slot t, so texts may differ in length: the padding of a shorter text
    lies ahead of it, where none of its tokens looks, and its next tokens overwrite the padding.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, like: Tensor):
        shape = rows, config.kv_heads, slots, config.head_size
        self.layers = [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.n_layers)
        ]
        self.slots = slots
        self.lengths = [0] * rows
        """Tokens held of each text. Lower a length to forget the text's last tokens."""
        self.next_B1: Tensor | None = None
        """Where the next token of each text goes, int64, on the device. If set, it is followed in
        place of `lengths`, so that a pass over one token can be captured as a CUDA graph."""

    def reserve(self, length: int) -> tuple[Tensor, list[LayerKV]]:
        """Makes room for `length` more tokens of each text.

        Returns:
            The new tokens' positions (B, T), int64, and each layer's LayerKV to read them with.

        Raises:
            ValueError: if the tokens do not fit.
        """
        end = max(self.lengths) + length
        if end > self.slots:
            raise ValueError(f"{end} tokens do not fit a cache of {self.slots}")
        device, start_B1 = self.layers[0][0].device, self.next_B1
        row_B1 = torch.arange(len(self.lengths), device=device)[:, None]
        if start_B1 is None:
            start_B1 = torch.tensor(self.lengths, device=device)[:, None]
        else:
            end = self.slots
        position_BT = start_B1 + torch.arange(length, device=device)
        mask_B1TS = torch.arange(end, device=device) <= position_BT[:, None, :, None]
        self.lengths = [held + length for held in self.lengths]
        layers = [LayerKV(*layer, row_B1, position_BT, mask_B1TS) for layer in self.layers]
        return position_BT, layers

    def select_rows(self, rows: list[int]) -> None:
        """Drops all texts but those in `rows`."""
        self.layers = [(key[rows], value[rows]) for key, value in self.layers]
        self.lengths = [self.lengths[row] for row in rows]
