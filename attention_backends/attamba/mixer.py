"""The sizes of Attamba's Mamba-2 mixers, SSM_k and SSM_v."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MixerSizes:
    """Sizes of a mixer.

    Attributes:
        heads: number of heads.
        inner: values of all heads; each head has inner / heads.
        state: values of the state, for each inner value.
        taps: of the convolution.
    """

    heads: int
    inner: int
    state: int
    taps: int
