"""The sizes and parameters of Attamba's Mamba-2 mixers, SSM_k and SSM_v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class MixerSizes:
    """Sizes of a mixer.

    Attributes:
        heads: number of heads.
        inner: values of all heads; each head has inner / heads.
        state: values of the state, for each inner value.
        taps: of the convolution.
        count: number of mixers of a layer.
    """

    heads: int
    inner: int
    state: int
    taps: int
    count: int = 2

    @property
    def channels(self) -> int:
        """Values that the convolution mixes: [u B C]."""
        return self.inner + 2 * self.state

    @property
    def width(self) -> int:
        """Values of a token that the scan of its chunk reads: [u B C | dt] of one mixer."""
        return self.channels + self.heads

    @property
    def row(self) -> int:
        """Values of a token that the scans of its chunk read, over all mixers."""
        return self.count * self.width


class MixerParameters(NamedTuple):
    """The parameters of M mixers besides their projections, in float32.

    Attributes:
        conv: (M, taps, channels); the last tap weighs the token itself.
        a_log: (M, heads), A = -exp(a_log).
        skip: (M, heads), D.
        norm: (M, inner), weight of the norm behind the gate.
    """

    conv: torch.Tensor
    a_log: torch.Tensor
    skip: torch.Tensor
    norm: torch.Tensor
