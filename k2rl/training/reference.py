"""The policy that a KL is measured from: the weights before the first step that asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from k2rl.training.sharding import local


class Reference:
    """A copy of the master weights, or of this rank's rows of them.

    It scores with the model's own passes: its values and the masters' change places for as long, tensor by
    tensor, so that there is one copy and no second model.
    """

    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        """Args:
        trained: masters, and those buffers that training changes, by name.
        """
        self._kept = {name: tensor.detach().clone() for name, tensor in trained.items()}

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._kept.items()

    @contextmanager
    def in_place_of(self, trained: Mapping[str, Tensor]) -> Iterator[None]:
        """Meanwhile the masters have the reference's values; afterwards their own, bit for bit."""
        self._exchange(trained)
        try:
            yield
        finally:
            self._exchange(trained)

    @torch.no_grad()
    def _exchange(self, trained: Mapping[str, Tensor]) -> None:
        for name, kept in self._kept.items():
            ours, theirs = local(kept), local(trained[name])
            before = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(before)
