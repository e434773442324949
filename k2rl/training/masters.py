"""Float32 master weights behind a model that computes in a lower precision.

At RL learning rates an update is far below bfloat16's resolution (8 bits of mantissa): applied to
bfloat16 weights it would round away. The optimizer therefore owns float32 copies; the model holds their
rounded image. Gradients of micro-batches are summed in float32 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from k2rl.models.factors import checkpoint_name
from k2rl.training.group import Group
from k2rl.training.sharding import fsdp_parameters, hold, holds_first_row, local


class MasterWeights:
    """Masters of all trainable parameters of `model`, under their checkpoint names, tied weights once.

    Frozen parameters have none: they are there in the compute dtype alone.

    In float32 the masters are the model's own parameters and nothing is copied. Those of a sharded model are,
    too: FSDP2 rounds what it gathers, and adds gradients up in float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, group: Group, keep_gradients: bool) -> None:
        """Take the masters from a float32 model, and turn its parameters (not its buffers) into `dtype`.

        Buffers stay float32: rotary frequencies in bfloat16 would shift positions.

        Args:
            model: plain, or sharded over the group.
            dtype: of computation.
            group: over which the model is sharded.
            keep_gradients: clear gradients instead of freeing them.
        """
        self._dtype = dtype
        self._group = group
        self._keep_gradients = keep_gradients
        named = [(checkpoint_name(name), parameter) for name, parameter in model.named_parameters()]
        self._compute: dict[str, nn.Parameter] = {name: p for name, p in named if p.requires_grad}
        self._frozen: dict[str, nn.Parameter] = {name: p for name, p in named if not p.requires_grad}
        self._masters: dict[str, nn.Parameter] = {}
        self._held = list(fsdp_parameters(model))
        self._shared = dtype == torch.float32 or group.world > 1
        for name, parameter in self._compute.items():
            if self._shared:
                self._masters[name] = parameter
                continue
            self._masters[name] = nn.Parameter(parameter.detach().clone())
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(self._collector(self._masters[name]))
        if not self._shared:
            for parameter in self._frozen.values():
                parameter.data = parameter.data.to(dtype)

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

    def memory(self) -> list[Tensor]:
        """All that masters and compute copies lie in, here. Who moves it calls `moved_in` afterwards."""
        if self._held:
            return [held._sharded_param_data for held in self._held]
        return [*self._frozen.values(), *self._parameters()]

    def moved_in(self) -> None:
        """See `memory`."""
        for held in self._held:
            hold(held, held._sharded_param_data)

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from {
            id(tensor): tensor for tensor in (*self._masters.values(), *self._compute.values())
        }.values()

    def gradients(self) -> list[Tensor]:
        """What this rank holds of them."""
        return [local(master.grad) for master in self._masters.values() if master.grad is not None]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What the model computes with, detached; of a sharded one the masters, which round to that.

        Frozen ones come first.
        """
        for name, parameter in (*self._frozen.items(), *self._compute.items()):
            yield name, parameter.detach()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the compute copies; after every optimizer step."""
        if not self._shared:
            torch._foreach_copy_(list(self._compute.values()), list(self._masters.values()))

    def clear_gradients(self) -> None:
        """Make all of them zero or nothing."""
        if self._keep_gradients:
            if gradients := self.gradients():
                torch._foreach_zero_(gradients)
            return
        for parameter in self._parameters():
            parameter.grad = None

    def clip_gradients(self, max_norm: float) -> float:
        """Scale all gradients so that their global norm is at most `max_norm` (0: never).

        A norm that is not finite leaves the gradients as they are.

        Returns:
            The norm before clipping, over all ranks.
        """
        gradients = self.gradients()
        norm = nn.utils.get_total_norm(gradients)
        if self._group.world > 1:
            squares = self._group.sum(norm.double().cpu().square())
            norm = squares.sqrt().to(norm)
        if max_norm > 0 and max_norm < float(norm) < float("inf"):
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return float(norm)

    def sample(self) -> list[Tensor]:
        """A copy of the first row of every master that has it here: shows how far a step moves them."""
        return [
            local(master.detach())[:1].clone() for master in self._masters.values() if holds_first_row(master)
        ]

    def moved(self, before: list[Tensor]) -> float:
        """Root of the mean square by which what `sample` shows has moved since."""
        moved = torch._foreach_sub(self.sample(), before) if before else []
        rms = float(nn.utils.get_total_norm(moved)) / math.sqrt(sum(part.numel() for part in moved) or 1)
        return self._group.gather(rms)[0]

    def nonfinite_gradients(self) -> list[str]:
        """Names of parameters whose gradient holds a NaN or an infinity, on any rank."""
        here = {
            name
            for name, master in self._masters.items()
            if master.grad is not None and not bool(torch.isfinite(local(master.grad)).all())
        }
        anywhere = set().union(*self._group.gather(here))
        return [name for name in self._masters if name in anywhere]
