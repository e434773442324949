"""Float32 master weights behind a model that computes in a lower precision.

At RL learning rates an update is far below bfloat16's resolution (8 bits of mantissa): applied to
bfloat16 weights it would round away. The optimizer therefore owns float32 copies; the model holds their
rounded image. Gradients of micro-batches are summed in float32 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class MasterWeights:
    """Masters of all trainable parameters of `model`, under their checkpoint names, tied weights once.

    In float32 the masters are the model's own parameters and nothing is copied.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Take the masters from a float32 model, and turn its parameters (not its buffers) into `dtype`.

        Buffers stay float32: rotary frequencies in bfloat16 would shift positions.
        """
        self._compute: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._masters: dict[str, nn.Parameter] = {}
        for name, parameter in self._compute.items():
            if dtype == torch.float32:
                self._masters[name] = parameter
                continue
            self._masters[name] = nn.Parameter(parameter.detach().clone())
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(self._collector(self._masters[name]))
        self._shared = dtype == torch.float32

    @staticmethod
    def _collector(master: nn.Parameter) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            assert gradient is not None
            if master.grad is None:
                master.grad = gradient.to(torch.float32)
            else:
                master.grad.add_(gradient)

        return collect

    def named_masters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._masters.items()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The compute copies, detached: what the model runs with."""
        for name, parameter in self._compute.items():
            yield name, parameter.detach()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the compute copies; after every optimizer step."""
        if not self._shared:
            torch._foreach_copy_(list(self._compute.values()), list(self._masters.values()))

    def drop_gradients(self) -> None:
        for parameter in (*self._masters.values(), *self._compute.values()):
            parameter.grad = None

    def clip_gradients(self, max_norm: float) -> float:
        """Scale all gradients so that their global norm is at most `max_norm` (0: never).

        A norm that is not finite leaves the gradients as they are.

        Returns:
            The norm before clipping.
        """
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm > 0 and max_norm < float(norm) < float("inf"):
            nn.utils.clip_grads_with_norm_(list(self._masters.values()), max_norm, norm)
        return float(norm)

    def sample(self) -> list[Tensor]:
        """A copy of the first row of every master: enough to see how far a step moves them, at no cost."""
        return [master.detach()[:1].clone() for master in self._masters.values()]

    def nonfinite_gradients(self) -> list[str]:
        """Names of parameters whose gradient holds a NaN or an infinity."""
        return [
            name
            for name, master in self._masters.items()
            if master.grad is not None and not bool(torch.isfinite(master.grad).all())
        ]
