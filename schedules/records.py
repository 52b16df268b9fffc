# SPDX-License-Identifier: Apache-2.0
"""What tuning found: an append-only store of trials and results, which builds take parameters from.

A directory holds `records.jsonl`, one JSON object per line:

    {"kind": "trial", "target": {...}, "loops": "contraction", "problem": {...}, "point": {...},
     "ratio": 0.91, "us": 402.1, "default_us": 441.7, "error": "", "date": "..."}
    {"kind": "result", ... the same ..., "interval": [0.89, 0.93], "kept": true, "trials": 32,
     "versions": {"kerf": "...", "tvm": "..."}}

A trial is one candidate timed beside the default (`ratio` is its time over the default's, null if it
failed). A result closes a search: the best candidate after a second, longer comparison; `kept` says
whether it won clearly. The last result of a problem counts, and only a kept one changes a kernel.
Records apply to the target they were made on alone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from schedules.errors import UserError
from schedules.target import CpuTarget

FILE = "records.jsonl"
_KINDS = ("trial", "result")
_FIELDS = {"kind": str, "target": dict, "loops": str, "problem": dict, "point": dict}


class Store(Protocol):
    """An append-only sequence of entries; one shared between machines has the same two methods."""

    def read(self) -> list[dict]: ...

    def append(self, entry: Mapping[str, Any]) -> None: ...


def target_key(target: CpuTarget) -> dict:
    """What must be equal for a record to apply: instruction set, caches, threads."""
    return {
        "arch": target.arch,
        "features": sorted(target.features),
        "l1_bytes": target.l1_bytes,
        "l2_bytes": target.l2_bytes,
        "threads": target.threads,
    }


def key_of(target: Mapping, loops: str, problem: Mapping) -> str:
    """The identity of a tuning problem."""
    return json.dumps([target, loops, problem], sort_keys=True)


@dataclass(frozen=True)
class DirectoryStore:
    """The store in a local directory. Entries are written under a lock: several processes may."""

    directory: Path

    @staticmethod
    def open(directory: str | Path, *, create: bool = False) -> DirectoryStore:
        """Raises UserError if the directory is missing (and not to be created), or is none."""
        path = Path(directory)
        if create:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise UserError("not a directory", where=str(path)) from None
            if not os.access(path, os.W_OK):
                raise UserError("cannot be written", where=str(path))
        elif not (path / FILE).is_file():
            raise UserError(
                f"no tuning records (no {FILE})",
                where=str(path),
                todo="Make them with compile-model tune MODEL --records DIR",
            )
        return DirectoryStore(path)

    @property
    def path(self) -> Path:
        return self.directory / FILE

    def read(self) -> list[dict]:
        """All entries, oldest first; a line cut off by a crash while it was written is left out.

        Raises UserError naming the first line that is no entry.
        """
        if not self.path.exists():
            return []
        complete = self.path.read_bytes()
        complete = complete[: complete.rfind(b"\n") + 1]
        return [
            _parse(line, f"{self.path}:{number}")
            for number, line in enumerate(complete.splitlines(), 1)
        ]

    def append(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry, sort_keys=True, allow_nan=False) + "\n").encode()
        with open(self.path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _drop_cut_off_line(self.path)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _drop_cut_off_line(path: Path) -> None:
    """Remove what follows the last newline: a line whose writer died."""
    size = path.stat().st_size
    if size == 0:
        return
    with open(path, "rb+") as file:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _parse(line: bytes, where: str) -> dict:
    todo = "Restore the file, or remove that line"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"damaged tuning record: {error}", where=where, todo=todo) from None
    wrong = [
        k
        for k, kind in _FIELDS.items()
        if not isinstance(entry, dict) or not isinstance(entry.get(k), kind)
    ]
    if not wrong and entry["kind"] not in _KINDS:
        wrong = ["kind"]
    if not wrong and not all(
        isinstance(entry.get(k), (int, float, type(None))) for k in ("ratio", "us", "default_us")
    ):
        wrong = ["ratio"]
    if wrong:
        raise UserError(
            f"damaged tuning record: no valid {wrong[0]!r}",
            where=where,
            found=line[:80].decode(errors="replace"),
            todo=todo,
        )
    return entry


@dataclass
class Records:
    """The entries of a store by problem, kept current while tuning adds; a `PointSource`."""

    store: Store
    trials: dict[str, list[dict]] = field(default_factory=dict)
    results: dict[str, dict] = field(default_factory=dict)

    @staticmethod
    def open(directory: str | Path, *, create: bool = False) -> Records:
        """The records in a local directory. Raises UserError if they cannot be read."""
        return Records.of(DirectoryStore.open(directory, create=create))

    @staticmethod
    def of(store: Store) -> Records:
        records = Records(store)
        for entry in store.read():
            records._take(entry)
        return records

    def _take(self, entry: dict) -> None:
        key = key_of(entry["target"], entry["loops"], entry["problem"])
        if entry["kind"] == "trial":
            self.trials.setdefault(key, []).append(entry)
        else:
            self.results[key] = entry

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry to the store and to this view of it."""
        self.store.append(entry)
        self._take(json.loads(json.dumps(entry)))

    def trials_of(self, target: CpuTarget, loops: str, problem: Mapping) -> list[dict]:
        return self.trials.get(self._key(target, loops, problem), [])

    def result_of(self, target: CpuTarget, loops: str, problem: Mapping) -> dict | None:
        return self.results.get(self._key(target, loops, problem))

    def lookup(self, target: CpuTarget, loops: str, problem: Mapping) -> dict | None:
        """The fields of the kept point of this problem; None if the default is to be used."""
        result = self.result_of(target, loops, problem)
        return dict(result["point"]) if result is not None and result.get("kept") else None

    @staticmethod
    def _key(target: CpuTarget, loops: str, problem: Mapping) -> str:
        # Through JSON, so that a tuple and the list it is stored as are one.
        return key_of(target_key(target), loops, json.loads(json.dumps(problem)))

    def ignored_for(self, target: CpuTarget) -> str:
        """What to tell a user about records made for other targets; empty if there are none."""
        mine = target_key(target)
        others = [r["target"] for r in self.results.values() if r["target"] != mine]
        if not others:
            return ""
        differing = sorted({name for other in others for name in _differing(mine, other)})
        return (
            f"{len(others)} tuning records are for another target"
            f" (other {', '.join(differing)}) and are ignored"
        )


def _differing(mine: Mapping, other: Mapping) -> Iterable[str]:
    return (name for name in mine if mine[name] != other.get(name))
