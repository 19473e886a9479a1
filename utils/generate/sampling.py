"""How the tokens of a story are drawn: options, which are read before torch is imported."""

from dataclasses import dataclass
from typing import Annotated

from config import NonNegativeFloat, NonNegativeInt, Range, Seed, check_fields


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: NonNegativeFloat = 0.8
    """Divides the logits before the draw. 0 takes the likeliest token each time."""
    top_k: NonNegativeInt = 50
    """Draw from this many of the likeliest tokens. 0 draws from all."""
    top_p: Annotated[float, Range(0, 1, exclude=(0,))] = 1.0
    """Draw from the fewest of these tokens whose probabilities add up to this."""
    seed: Seed = 0
    """Seed of the draws. Story i of several is what it would be alone with seed + i."""

    def __post_init__(self) -> None:
        check_fields(self)
