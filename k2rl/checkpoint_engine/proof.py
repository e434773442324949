"""Which modules of a vLLM model can be updated by recorded copies, and which keep their loaders."""

from __future__ import annotations

import logging

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer

from k2rl.checkpoint_engine.copies import CopyRecorder, Writes
from k2rl.checkpoint_engine.vllm_modules import keeps_layout, moves_experts

log = logging.getLogger(__name__)


def modules_written(recorder: CopyRecorder) -> dict[torch.nn.Module, dict[str, Writes]]:
    """Modules that the update wrote to, in the model's order."""
    modules: dict[torch.nn.Module, dict[str, Writes]] = {}
    for (module, name), writes in recorder.writes.items():
        if writes.touched:
            modules.setdefault(module, {})[name] = writes
    return modules


def modules_with_loaders(
    modules: dict[torch.nn.Module, dict[str, Writes]],
    recorder: CopyRecorder,
    names: dict[torch.nn.Module, str],
) -> set[torch.nn.Module]:
    """Modules whose updates are no plain copies, and those that share a tensor with one."""
    reasons = {}
    owners: dict[int, torch.nn.Module] = {}
    for module, parameters in modules.items():
        reason = _why_loader(module, parameters, recorder)
        for name in parameters:
            live = getattr(module, name, None)
            if live is not None and owners.setdefault(id(live), module) is not module:
                reason = f"{name} is tied, and written twice"
                reasons[owners[id(live)]] = reason
        if reason:
            reasons[module] = reason
    shared: set[str] = set()
    grown = -1
    while grown != len(reasons):
        grown = len(reasons)
        for module in reasons:
            shared |= {name for writes in modules[module].values() for name in writes.names}
        for module, parameters in modules.items():
            if any(writes.names & shared for writes in parameters.values()):
                reasons.setdefault(module, "it shares a tensor with another such module")
    for module, reason in reasons.items():
        log.debug("%s goes on using its loader: %s", names[module], reason)
    return set(reasons)


def _why_loader(module: torch.nn.Module, parameters: dict[str, Writes], recorder: CopyRecorder) -> str:
    """Why a module cannot do without its loader; "" if it can."""
    if is_deferred_attention_layer(module):
        return "attention layers take their scales in a way of their own"
    if moves_experts(module):
        return "its experts change places"
    for name, writes in parameters.items():
        if writes.impure:
            return f"{name} was {writes.impure}"
        if writes.missing():
            return f"{name} has padding that is not filled"
        if changed := sorted(writes.names & recorder.changed):
            return f"its loader changes {changed[0]}"
    if keeps_layout(module) and not _holds_what_was_sent(module, parameters, recorder):
        return "its parameters do not hold what was sent"
    return ""


def _holds_what_was_sent(
    module: torch.nn.Module, parameters: dict[str, Writes], recorder: CopyRecorder
) -> bool:
    """Whether the live parameters are just what was copied, in the layout in which it is loaded."""
    for name, writes in parameters.items():
        live = getattr(module, name, None)
        if live is None or tuple(live.shape) != writes.shape or not live.is_contiguous():
            return False
        for copy in writes.copies.values():
            sent = copy.source.view.of(recorder.tensor(copy.name))
            if not _same(copy.target.view.of(live.data), sent):
                return False
    return True


def _same(live: torch.Tensor, sent: torch.Tensor) -> bool:
    return torch.equal(_bits(live), _bits(sent.to(live.device).to(live.dtype)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
