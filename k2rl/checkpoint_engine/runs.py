"""What each host has of a bucket, and in which messages that goes from host to host. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from k2rl.checkpoint_engine.plan import ALIGNMENT, Bucket

#: Most bytes and pieces in a message: the kernel takes up to 1024 pieces at once, one of them a header.
MESSAGE_BYTES, MESSAGE_PIECES = 1 << 20, 1000


class Run(msgspec.Struct, frozen=True):
    """Bytes `offset` to `offset + nbytes` of a bucket, that host `source` has."""

    source: int
    offset: int
    nbytes: int


class Message(msgspec.Struct, frozen=True):
    """Runs that travel together, all of one source."""

    pieces: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def runs(bucket: Bucket, host_of: Mapping[int, int]) -> list[Run]:
    """What each host has of a bucket, in order; `host_of` says on which host an owner is.

    Parts of one host with nothing but padding between them are one run.
    """
    merged: list[Run] = []
    parts = sorted(
        (*block.place(part), host_of[part.owner]) for block in bucket.blocks for part in block.parts
    )
    for offset, nbytes, source in parts:
        last = merged[-1] if merged else None
        if last and last.source == source and offset - (last.offset + last.nbytes) < ALIGNMENT:
            merged[-1] = Run(source, last.offset, offset + nbytes - last.offset)
        elif nbytes:
            merged.append(Run(source, offset, nbytes))
    return merged


def messages(
    runs: Sequence[Run], message_bytes: int = MESSAGE_BYTES, pieces: int = MESSAGE_PIECES
) -> dict[int, list[Message]]:
    """By source, in order: large runs cut evenly, small ones put together."""
    found: dict[int, list[Message]] = {}
    together: dict[int, list[Run]] = {}
    room: dict[int, int] = {}
    for run in (run for run in runs if run.nbytes):
        source = run.source
        mine = found.setdefault(source, [])
        if run.nbytes >= message_bytes:
            count = -(-run.nbytes // message_bytes)
            cuts = [run.offset + run.nbytes * index // count for index in range(count + 1)]
            mine += [Message((Run(source, start, stop - start),)) for start, stop in pairwise(cuts)]
            continue
        waiting = together.setdefault(source, [])
        if waiting and (run.nbytes > room[source] or len(waiting) == pieces):
            mine.append(Message(tuple(waiting)))
            waiting = together[source] = []
        if not waiting:
            room[source] = message_bytes
        waiting.append(run)
        room[source] -= run.nbytes
    for source, waiting in together.items():
        found[source].append(Message(tuple(waiting)))
    return found
