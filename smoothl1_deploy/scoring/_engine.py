"""What every engine does with a piece, and the engine of this machine.

An engine is a function of a job, a plan and the pieces to do; it yields a `PieceResult` for each,
in any order. Partial results are exact, so the order doesn't show in the result.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._floats import Array
from ..errors import InvalidInputError, SmoothL1DeployError
from ._partial import Partial
from ._scorer import Job, Scorer
from ._shards import Piece, Plan, Shard
from ._sources import Source, open_source


@dataclass(frozen=True, slots=True)
class PieceResult:
    """A finished piece.

    Attributes:
        piece: its index in the plan.
        partial: what it adds to the result.
        checksums: role -> CRC-32 of the rows that were read.
        scores: of its rows, where the job gives scores.
    """

    piece: int
    partial: Partial
    checksums: dict[str, int]
    scores: Array | None = None


class _Reader:
    """The files of the shard read last stay open: its next piece goes on where this one ends."""

    def __init__(self) -> None:
        self._shard: Shard | None = None
        self._sources: dict[str, Source] = {}

    def batches(self, piece: Piece, shard: Shard) -> Iterator[dict[str, Array]]:
        """The arrays of each batch by role, valid until the next one is taken."""
        if self._shard is not shard:
            self.close()
            self._open(shard)
        for start in range(piece.start, piece.stop, piece.batch):
            stop = min(start + piece.batch, piece.stop)
            yield {role: source.read(start, stop) for role, source in self._sources.items()}

    def _open(self, shard: Shard) -> None:
        for role, location in shard.files.items():
            self._sources[role] = source = open_source(location)
            if source.shape != shard.shapes[role]:
                raise InvalidInputError(
                    f"{location} has changed while it was scored: its shape was "
                    f"{shard.shapes[role]} and is {source.shape}; score it again from the start"
                )
            if shard.flat:
                source.flatten()
        self._shard = shard

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        self._shard, self._sources = None, {}


def _add(sums: dict[str, int], batch: dict[str, Array]) -> None:
    for role, array in batch.items():
        data: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        sums[role] = zlib.crc32(data, sums.get(role, 0))


class PieceScorer:
    """One session, and the files of the shard it works on."""

    def __init__(self, job: Job) -> None:
        self._scorer = Scorer(job)
        self._reader = _Reader()
        self._beside = ThreadPoolExecutor(1, "smoothl1-deploy checksum")

    def score(self, piece: Piece, shard: Shard) -> PieceResult:
        """Read a piece batch by batch and score it.

        Raises:
            SmoothL1DeployError: naming the shard and the rows.
        """
        partial, sums, scores = Partial(), dict[str, int](), list[Array]()
        try:
            for batch in self._reader.batches(piece, shard):
                # Beside the loss: zlib lets other threads run, and this is a third of the work.
                summed = self._beside.submit(_add, sums, batch)
                try:
                    added, rows = self._scorer.score(batch)
                finally:
                    summed.result()
                partial += added
                if rows is not None:
                    scores.append(rows)
        except SmoothL1DeployError as exc:
            where = "" if shard.flat else f", rows {piece.start} to {piece.stop}"
            raise type(exc)(f"shard {shard.name}{where}: {exc}") from exc
        joined = np.concatenate(scores) if scores else None
        return PieceResult(piece.index, partial, sums, joined)

    def close(self) -> None:
        """Let go of the files."""
        self._beside.shutdown()
        self._reader.close()


def score_locally(
    job: Job, plan: Plan, pieces: Iterable[Piece]
) -> Generator[PieceResult, None, None]:
    """One piece after the other, in this process."""
    with contextlib.closing(PieceScorer(job)) as scorer:
        for piece in pieces:
            yield scorer.score(piece, plan.shards[piece.shard])


def checksums(plan: Plan, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, dict[str, int]]]:
    """Read `pieces` again, without scoring them; the checksums are those of a `PieceResult`."""
    with contextlib.closing(_Reader()) as reader:
        for piece in pieces:
            sums: dict[str, int] = {}
            for batch in reader.batches(piece, plan.shards[piece.shard]):
                _add(sums, batch)
            yield piece, sums
