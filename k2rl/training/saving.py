"""A trainer's state in torch's distributed checkpoint format: each rank writes its rows, any number reads.

Saving has two halves. `Saver.start` copies the state aside; a thread then writes the copy while the next
rollout runs. The checkpoint's folder appears once all ranks have written, with everything on disk.
"""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from k2rl.errors import ConfigError, RunError
from k2rl.training.checkpoint import FORMAT, About, file_records, read_about, replaced_folder, write_about
from k2rl.training.group import DistributedGroup, Group
from k2rl.workers.memory import trim

METADATA_FILE = ".metadata"

State = dict[str, Tensor]
"""Tensors by slash-separated names: `masters/<weight>`, `optimizer/<weight>/<key>`, `step_count`, `rng`."""

_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, KeyError, ValueError, AttributeError, ImportError),
    *(pickle.UnpicklingError, CheckpointException),
)

# torch says so at every checkpoint of a trainer that is alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Saver:
    """Writes one checkpoint at a time in the background; has a group of its own for that."""

    def __init__(self, group: Group) -> None:
        self._group = group.new_group()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, folder: Path, state: State, about: Callable[[dict[str, Any]], About]) -> None:
        """Begin to write a state, which must not change any more; the one before must have been waited for.

        Args:
            folder: of the checkpoint.
            state: this rank's part of it.
            about: makes the description, of the files' records.
        """

        def write() -> None:
            nonlocal state
            try:
                write_checkpoint(folder, state, about, self._group)
            except BaseException as error:  # noqa: BLE001  `wait` raises it, in the thread that can tell somebody
                self._error = error
            finally:
                # The copy's memory is not kept until somebody waits, which may be a step later.
                state = {}
                trim()

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until all is written.

        Raises:
            RunError: it could not be written; nothing of it is left, earlier checkpoints are as they were.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def write_checkpoint(
    folder: Path, state: State, about: Callable[[dict[str, Any]], About], group: Group
) -> None:
    """Write a whole checkpoint; `folder` is there afterwards or not at all, whatever happens meanwhile.

    Raises:
        RunError: on all ranks, if one cannot write.
    """
    with ExitStack() as undo:

        def begin() -> Path | None:
            return undo.enter_context(replaced_folder(folder)) if group.rank == 0 else None

        target = group.gather(group.agreed(lambda: _writing(folder, begin)))[0]
        assert target is not None
        group.agreed(lambda: _writing(folder, lambda: _write_state(target, state, group)))

        def records() -> dict[str, Any]:
            return file_records(target.glob(f"__{group.rank}_*.distcp"))

        written = group.gather(group.agreed(lambda: _writing(folder, records)))

        def end() -> None:
            if group.rank:
                return
            files = file_records([target / METADATA_FILE])
            for record in written:
                files |= record
            write_about(target, about(files))
            if read_about(target) is None:
                raise OSError(f"other ranks wrote it elsewhere than rank 0: they must share {folder.parent}")
            undo.close()

        group.agreed(lambda: _writing(folder, end))


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # A full disk, say: that torch could not end its archive then hides why.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise cause from error


def _write_state(target: Path, state: State, group: Group) -> None:
    writer = _Writer(target, sync_files=True)
    if isinstance(group, DistributedGroup):
        save(state, storage_writer=writer, process_group=group.process_group)
    else:
        save(state, storage_writer=writer, no_dist=True)


def _writing(folder: Path, work: Callable[[], Any]) -> Any:
    """Turn what goes wrong with files into one line."""
    try:
        return work()
    except (OSError, CheckpointException) as error:
        raise RunError(f"checkpoint {folder.name} cannot be written: {_cause(error)}") from error


def snapshot(
    named: Iterable[tuple[str, Tensor]], group: Group, readable: Callable[[Tensor], Tensor]
) -> State:
    """Copies in the host's memory, of this rank's rows where tensors are sharded.

    Args:
        named: the state.
        group: of all ranks.
        readable: where the values of what this rank holds of a tensor can be read.
    """

    def copied(tensor: Tensor) -> Tensor:
        return readable(tensor).to("cpu", copy=True)

    return {name: on_host(tensor, group, copied) for name, tensor in named}


def on_host(tensor: Tensor, group: Group, copy: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor whose local part is what `copy` makes of the one given, in the host's memory."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return copy(tensor)
    assert isinstance(group, DistributedGroup)
    return DTensor.from_local(
        copy(tensor.to_local()),
        group.host_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def read_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The tensors of a checkpoint's state.

    Raises:
        ConfigError: if there is no checkpoint, it is damaged, or of another format.
    """
    about = read_about(folder)
    if about is None:
        raise ConfigError(f"{folder} holds no whole trainer checkpoint")
    if about.format != FORMAT:
        raise ConfigError(f"{folder} has checkpoint format {about.format}, this version reads {FORMAT}")
    metadata: Metadata = _reading(folder, FileSystemReader(folder).read_metadata)
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_into(folder: Path, state: Mapping[str, Tensor], group: Group) -> None:
    """Fill tensors of a checkpoint's shapes, or this rank's rows of them, in place.

    Raises:
        ConfigError: if it cannot be read.
    """
    reader = FileSystemReader(folder)
    if isinstance(group, DistributedGroup):
        options: dict[str, Any] = {"process_group": group.process_group}
    else:
        options = {"no_dist": True}
    _reading(folder, lambda: load(dict(state), storage_reader=reader, **options))


def read_state(folder: Path) -> State:
    """All of a checkpoint's state, whole, whoever wrote it.

    Raises:
        ConfigError: as `read_shapes` and `read_into`.
    """
    state = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in read_shapes(folder).items()}
    read_into(folder, state, Group())
    return state


def _reading(folder: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except _UNREADABLE as error:
        raise ConfigError(f"{folder} cannot be read as a checkpoint: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """In one line; what torch has gathered from ranks is that of the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
