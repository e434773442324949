"""How a live vLLM model takes new weights: at first through its loaders, from then on as recorded copies.

The first complete update goes through vLLM's layerwise reload, and a recorder notes which elements of which
tensor end up where. Later updates replay that as plain copies: directly into the live parameters where these
have the layout that is loaded, module by module with vLLM's own post-processing where they are repacked.
A module that cannot be proved to hold copies goes on using its loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
    initialize_online_processing,
)
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors

from k2rl.checkpoint_engine.copies import Copy, CopyRecorder, Key, Writes
from k2rl.checkpoint_engine.messages import TransferError
from k2rl.checkpoint_engine.plan import Box, Needs
from k2rl.checkpoint_engine.proof import modules_with_loaders, modules_written
from k2rl.checkpoint_engine.regions import View, strides_of, whole_box
from k2rl.checkpoint_engine.vllm_modules import (
    Rebuild,
    is_padded,
    keeps_layout,
    prepare_reload,
    refresh_packed,
)

#: Parameters that an error names.
SHOWN = 5


class ModelLoader:
    """Puts updates into a live vLLM model.

    An update is `begin`, any number of `load` or `load_boxes`, `finish`, all in vLLM's current config. If
    anything raises, the model is in no state to serve until another update is complete; that one starts with
    `begin` again.

    The tensors of an update that is learned from (`needs` is None) must stay as they are until `finish`
    returns; later, until the call returns that got them (on CUDA: until `finish` returns).
    """

    def __init__(self, model: Any, model_config: Any, device: torch.device) -> None:
        self._model = model
        self._model_config = model_config
        self._device = device
        self._names = {module: name for name, module in model.named_modules()}
        # Now, while tied parameters are one: an update that broke off leaves them apart.
        self._expected = _loadable(model)
        self._recorder: CopyRecorder | None = None
        self._replay: _Replay | None = None
        self._complete = False

    @property
    def needs(self) -> Needs | None:
        """Boxes of the tensors that this worker reads, by name; None before the first complete update."""
        return None if self._replay is None else self._replay.needs

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """Sets of tensors that a partial update brings whole and together or not at all, by name."""
        return () if self._replay is None else self._replay.together

    def begin(self, *, partial: bool = False) -> None:
        """Start an update, also after one that broke off; a partial one leaves the rest as it is.

        Raises:
            TransferError: it is partial, and there has been no complete one, or not since one broke off.
        """
        if partial and (self._replay is None or not self._complete):
            raise TransferError("a partial update needs a complete one before it")
        self._complete = False
        if self._replay is not None:
            self._replay.begin(partial=partial)
            return
        with torch.no_grad():
            _heal(self._model)
            prepare_reload(self._model.modules())
            initialize_layerwise_reload(self._model)
        self._recorder = _watching(self._model)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Put whole tensors in place.

        Raises:
            TransferError: a tensor is not one of those that the first update consisted of, or has
                another shape.
        """
        with torch.no_grad():
            if self._replay is not None:
                self._replay.load((name, None, tensor) for name, tensor in tensors)
                return
            if self._recorder is None:
                raise TransferError("no update has begun")
            with self._recorder:
                self._model.load_weights(self._recorder.sources(tensors))

    def load_boxes(self, pieces: Iterable[tuple[str, Box, torch.Tensor]]) -> None:
        """Put boxes of tensors in place: whole boxes of `needs`, or, in a partial update, rows.

        Raises:
            TransferError: it is not known yet what goes where, or a piece has other tensors or cuts.
        """
        if self._replay is None:
            raise TransferError("the first update of an engine takes whole tensors")
        with torch.no_grad():
            self._replay.load(pieces)

    def finish(self) -> None:
        """Complete the update.

        Raises:
            TransferError: it did not reach all of the model; names the parameters.
        """
        with torch.no_grad():
            if self._replay is not None:
                self._replay.finish()
            else:
                self._learn()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._complete = True

    def _learn(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            raise TransferError("no update has begun")
        finalize_layerwise_reload(self._model, self._model_config)
        refresh_packed(self._model)
        _check_reached(self._names, self._expected, recorder)
        self._replay = _Replay(self._model, self._model_config, self._names, recorder)
        recorder.release()


class _Replay:
    """The recorded copies of a model, and how far the current update is."""

    def __init__(
        self,
        model: Any,
        model_config: Any,
        names: dict[torch.nn.Module, str],
        recorder: CopyRecorder,
    ) -> None:
        self._model = model
        self._model_config = model_config
        self._names = names
        self._wholes = {name: whole_box(shape) for name, shape in recorder.shapes.items()}
        #: By name of the tensor.
        self._copies: dict[str, list[_Placed]] = {name: [] for name in recorder.shapes}
        self._routes: dict[tuple[str, Box | None], _Routes] = {}
        #: Those into live parameters, by parameter.
        self._direct: dict[Key, list[_Placed]] = {}
        self._rebuilds: list[Rebuild] = []
        #: Modules that keep their loaders, and the tensors that these take.
        self._loaded_modules: list[torch.nn.Module] = []
        self._loaded_names: set[str] = set()
        self._seen: set[str] = set()
        self._assign(modules_written(recorder), recorder)
        self._all = [placed for several in self._copies.values() for placed in several]
        self.needs: Needs = {
            name: [whole]
            if name in self._loaded_names
            else list(dict.fromkeys(placed.copy.source.box for placed in self._copies[name]))
            for name, whole in self._wholes.items()
            if name in self._loaded_names or self._copies[name]
        }
        self.together = tuple(self._find_together())
        for name in self._wholes:  # now, so that the next update need not
            for box in (None, *self.needs.get(name, ())):
                self._route(name, box)

    def _assign(self, modules: dict[torch.nn.Module, dict[str, Writes]], recorder: CopyRecorder) -> None:
        """Decide how each module is updated."""
        loaded = modules_with_loaders(modules, recorder, self._names)
        for module, parameters in modules.items():
            if module in loaded:
                self._loaded_modules.append(module)
                self._loaded_names |= {name for writes in parameters.values() for name in writes.names}
                continue
            rebuild = None if keeps_layout(module) else Rebuild(module, parameters)
            if rebuild is not None:
                self._rebuilds.append(rebuild)
            for parameter, writes in parameters.items():
                for copy in writes.copies.values():
                    placed = _Placed(copy, module, parameter, rebuild)
                    self._copies[copy.name].append(placed)
                    if rebuild is not None:
                        rebuild.expected += 1
                    else:
                        self._direct.setdefault((module, parameter), []).append(placed)
        if self._loaded_modules:
            # What a loader keeps for later is in no record.
            self._loaded_names |= {name for name, copies in self._copies.items() if not copies}

    def _find_together(self) -> Iterator[tuple[str, ...]]:
        """What is packed or loaded as one; and what has no rows that could be placed alone."""
        packed: dict[Rebuild, set[str]] = {}
        for placed in self._all:
            if placed.rebuild is not None:
                packed.setdefault(placed.rebuild, set()).add(placed.copy.name)
            elif not placed.copy.has_rows:
                yield (placed.copy.name,)
        for names in (*packed.values(), self._loaded_names):
            if names:
                yield tuple(sorted(names))

    def begin(self, *, partial: bool) -> None:
        self._partial, self._touched, self._loading = partial, False, False
        for placed in self._all:
            placed.done = False
        for (module, parameter), several in self._direct.items():
            live = getattr(module, parameter)
            if several[0].target.untyped_storage()._cdata != live.untyped_storage()._cdata:
                for placed in several:
                    placed.aim()
        for rebuild in self._rebuilds:
            rebuild.abandon()
        self._seen.clear()
        if self._loaded_modules and not partial:
            self._begin_loading()

    def _begin_loading(self) -> None:
        """Make the modules that keep their loaders ready for these, once an update."""
        if self._loading:
            return
        self._loading = True
        _heal(self._model)
        prepare_reload(self._loaded_modules)
        for module in self._loaded_modules:
            info = get_layerwise_info(module)
            info.kernel_tensors = get_layer_params_buffers(module)
            info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
            restore_layer_on_meta(module, info)
            initialize_online_processing(module)

    def load(self, pieces: Iterable[tuple[str, Box | None, torch.Tensor]]) -> None:
        """Boxes of tensors; None: the whole tensor."""
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for_loaders: list[tuple[str, torch.Tensor]] = []
        begun: dict[Rebuild, None] = {}
        for name, box, tensor in pieces:
            self._touched = True
            if self._partial and box is not None:
                self._add_rows(name, box, tensor, targets, sources)
                continue
            shape, routes = self._routes.get((name, box)) or self._route(name, box)
            if tensor.shape != shape:
                raise TransferError(f"{name}: got shape {list(tensor.shape)}, expected {list(shape)}")
            if name in self._loaded_names:
                for_loaders.append((name, tensor))
                self._seen.add(name)
                continue
            dense = tensor if tensor.is_contiguous() else tensor.contiguous()
            for placed, view in routes:
                if placed.done:
                    continue
                placed.done = True
                source = dense if view is None else view.of(dense)
                if placed.rebuild is None:
                    targets.append(placed.target)
                    sources.append(source)
                elif placed.rebuild.take(placed.parameter, placed.copy.target.view, source):
                    begun.pop(placed.rebuild, None)
                else:
                    begun[placed.rebuild] = None
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for rebuild in begun:
            rebuild.copy()
        if for_loaders:
            self._begin_loading()
            self._model.load_weights(iter(for_loaders))

    def _add_rows(
        self,
        name: str,
        box: Box,
        tensor: torch.Tensor,
        targets: list[torch.Tensor],
        sources: list[torch.Tensor],
    ) -> None:
        for placed in self._copies[name]:
            if (rows := placed.rows(box, tensor)) is not None:
                targets.append(rows[0])
                sources.append(rows[1])

    def _route(self, name: str, box: Box | None) -> _Routes:
        """Where a piece goes: its shape, and each copy from it; None: of all of the piece, as it lies."""
        whole = self._wholes.get(name)
        if whole is None:
            raise TransferError(f"{name} was not in the update that the engine learned from")
        piece = whole if box is None else box
        if name in self._loaded_names and piece != whole:
            raise TransferError(f"{name} is needed whole, got {_shown(piece)}")
        if len(piece) != len(whole) or any(b > end for (_, b), (_, end) in zip(piece, whole, strict=True)):
            raise TransferError(f"{name}: there is no {_shown(piece)} in {_shown(whole)}")
        shape = tuple(stop - start for start, stop in piece)
        dense = View(0, shape, strides_of(shape))
        routes = [
            (placed, None if view == dense else view)
            for placed in self._copies[name]
            if (view := placed.copy.source.within(piece)) is not None
        ]
        self._routes[name, box] = shape, routes
        return shape, routes

    def finish(self) -> None:
        missing = {
            _join(self._names[placed.module], placed.parameter)
            for placed in self._all
            if not placed.done and (not self._partial or (placed.rebuild and placed.rebuild.begun))
        }
        if not self._partial or self._seen:
            missing |= self._loaded_names - self._seen
        if missing:
            raise TransferError(_not_updated(missing))
        if not self._touched:
            return
        if self._loading:
            finalize_layerwise_reload(self._model, self._model_config)
        done = set(self._loaded_modules) if self._loading else set()
        for module in self._model.modules():
            if is_deferred_attention_layer(module) and module not in done:
                module.process_weights_after_loading(self._model_config.dtype)
        refresh_packed(self._model)


class _Placed:
    """One copy of every update."""

    __slots__ = ("copy", "done", "module", "parameter", "rebuild", "target")

    def __init__(self, copy: Copy, module: torch.nn.Module, parameter: str, rebuild: Rebuild | None) -> None:
        self.copy = copy
        self.module = module
        self.parameter = parameter
        self.rebuild = rebuild
        self.done = False
        if rebuild is None:
            self.aim()

    def aim(self) -> None:
        """At the live parameter."""
        self.target = self.copy.target.view.of(getattr(self.module, self.parameter).data)

    def rows(self, box: Box, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What of a piece of whole rows goes here, target and source; None: nothing."""
        cut = self.copy.source.rows(*box[0])
        if cut is None:
            return None
        dimension, first, stop, view = cut
        target = self.target if dimension is None else self.target.narrow(dimension, first, stop - first)
        return target, view.of(tensor.contiguous())


_Routes = tuple[tuple[int, ...], list[tuple[_Placed, View | None]]]


def _loadable(model: torch.nn.Module) -> list[set[Key]]:
    """The parameters that checkpoints fill, tied ones as one set."""
    groups: dict[int, set[Key]] = {}
    for module in model.modules():
        if is_deferred_attention_layer(module):
            continue  # what they hold is derived from others, or a scale that a checkpoint may lack
        restored = get_layerwise_info(module).restore_metadata[0]
        for name, parameter in module._parameters.items():
            if parameter is not None and (name in restored or name in ("bias", "e_score_correction_bias")):
                groups.setdefault(id(parameter), set()).add((module, name))
    return list(groups.values())


def _watching(model: torch.nn.Module) -> CopyRecorder:
    """A recorder of everything that loaders may write to."""
    recorder = CopyRecorder()
    for module in model.modules():
        for name, tensor in get_layer_tensors(module).items():
            recorder.watch((module, name), tensor)
    return recorder


def _heal(model: torch.nn.Module) -> None:
    """Undo an update that broke off: what it had buffered must not be taken for part of the next."""
    for module in model.modules():
        info = get_layerwise_info(module)
        if info.kernel_tensors is not None:
            _place_kernel_tensors(module, info)
        info.reset()


def _check_reached(
    names: dict[torch.nn.Module, str],
    expected: list[set[Key]],
    recorder: CopyRecorder,
) -> None:
    missing = set()
    for group in expected:
        if not any(_reached(recorder.writes[key], key[0]) for key in group if key in recorder.writes):
            missing |= {_join(names[module], name) for module, name in group}
    if missing:
        raise TransferError(_not_updated(missing))


def _reached(writes: Writes, module: torch.nn.Module) -> bool:
    if not writes.touched:
        return False
    return bool(writes.impure) or is_padded(module) or not writes.missing()


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def _not_updated(missing: Iterable[str]) -> str:
    names = sorted(missing)
    rest = len(names) - SHOWN
    shown = ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
    return f"{len(names)} parameters were not updated: {shown}"
