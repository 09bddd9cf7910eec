"""Pruning a model that is in memory block by block: a pruned block goes to its place in the files of the output at once.

Those files are the journal: a block that they hold is not pruned again, and its measurements lie beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparsight import distributed
from sparsight.checkpoint.parts import PartFiles
from sparsight.errors import SparsightError, first_line
from sparsight.files import read_json, write_json
from sparsight.model.anatomy import Layer

logger = logging.getLogger(__name__)


class StreamJournal:
    """The blocks that are pruned, in `files`, and their measurements by stop, in `folder`; see `Journal`.

    `dense`: the walk goes on through the dense blocks, so that pruned ones are read only once it is over.
    """

    def __init__(self, files: PartFiles, folder: Path, *, dense: bool = False) -> None:
        self.files, self.folder, self.dense = files, folder, dense
        self.stream = files.stream
        self._facts: dict[str, dict[str, Any]] = {}  # by block, then by stop
        self._open: str | None = None  # a block of which some stops are over
        self._facts |= distributed.on_main(self._start)
        self.done: set[str] = {*self._facts}
        if not dense:
            self._read_done()

    def _start(self) -> dict[str, dict[str, Any]]:
        """Take the space of all weights; the measurements of the blocks that an interrupted run has written."""
        self.folder.mkdir(exist_ok=True)
        made, notes = self.files.make(), [*self.folder.iterdir()]
        if made and notes:
            logger.warning("%s; all blocks are pruned again", made[0])
            for note in filter(Path.is_file, notes):
                note.unlink()
        facts = {}
        for block in filter(None, self.stream.parts):
            if (note := self._note(block)).is_file():
                try:
                    found = read_json(note, "it is pruned again")
                    if not found or not all(isinstance(each, dict) for each in found.values()):
                        raise SparsightError(f"{note}: holds no measurements")
                    facts[block] = found
                except SparsightError as error:
                    logger.warning("%s (its block is pruned again)", first_line(error))
        return facts

    def _note(self, block: str) -> Path:
        return self.folder / f"{block}.json"

    def _read_done(self) -> None:
        self.stream.drop()
        self.stream.sources |= {block: partial(self.files.read, block) for block in self.done}

    def recall(self, stop: str, layers: Sequence[Layer]) -> dict | None:
        """The measurements of a stop whose block the files hold pruned, which the walk then goes through; None otherwise."""
        block = layers[0].block
        return self._facts[block].get(stop, {}) if block in self.done else None

    def store(self, stop: str, layers: Sequence[Layer], facts: dict) -> None:
        """Keep a stop's measurements; a block is written once its last stop is over."""
        block = layers[0].block
        if self._open not in (None, block):  # a walk closes it before it goes on
            raise RuntimeError(f"{block} was reached before {self._open} was written")
        self._open = self.stream.keep = block
        self._facts.setdefault(block, {})[stop] = facts
        if stop == block:
            self.close()

    def close(self) -> None:
        """Write the block of which stops are over."""
        block, self._open = self._open, None
        if block is None:
            return
        self.stream.bring(block)
        self.stream.keep = None
        distributed.on_main(partial(self._write, block))
        self.done.add(block)
        if not self.dense:
            self.stream.sources[block] = partial(self.files.read, block)

    def _write(self, block: str) -> None:
        self.files.write(block)
        write_json(self._note(block), self._facts[block], indent=None)

    def finish(self) -> None:
        """Read pruned blocks from now on; the main process writes all other parts."""
        self._read_done()
        if distributed.is_main():
            for part in self.stream.parts:
                if part not in self.done:
                    self.stream.bring(part)
                    self.files.write(part)
            self.stream.drop()
