"""Reads the records of a data set: from the hub, at a pinned commit, or from a local file of the same schema.

Local files are json (a list, or an object with one list in it), jsonl, csv or parquet, determined by their suffix.
Every record is checked when the file is read, against the fields that the task needs. A malformed record raises a
DataError that names the file, the line and the field.
"""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from d2obench.errors import DataError

Record = TypeVar("Record", bound=msgspec.Struct)
Row = dict[str, Any]


class BadField(NamedTuple):
    """A field because of which a record can't be scored, and what is wrong with it; its type is right."""

    field: str
    why: str


@dataclass(frozen=True)
class Source:
    """Where a data set is on the hub.

    Args:
        hub: ``owner/name`` of the data set.
        revision: the commit.
        split: the split.
        config: the configuration, where the data set has several.
        archive: a zip file in the repository, for data sets that are packed in one.
        member: the jsonl file in that archive.
    """

    hub: str
    revision: str
    split: str
    config: str | None = None
    archive: str = ""
    member: str = ""


def records(
    task: str,
    source: Source,
    path: str | None,
    kind: type[Record],
    *,
    prepare: Callable[[Row], Row] = lambda row: row,
    check: Callable[[Record], BadField | None] = lambda record: None,
    limit: int = 0,
) -> list[Record]:
    """The records of a data set; all of them are checked.

    Args:
        task: the task's name, for messages.
        source: where to get the data set when ``path`` is None.
        path: a local file in its place.
        kind: the fields that the task needs, with their types; other fields are ignored.
        prepare: brings a row of another known format into the schema of ``kind``.
        check: finds what makes a record impossible to score, beyond its types.
        limit: the largest number of records to return; 0: all.

    Raises:
        DataError: the file or data set is missing, can't be read, or is malformed.
    """
    path = path and str(Path(path).expanduser())
    rows = _local(path) if path else _hub(task, source)
    checked: list[Record] = []
    for place, row in rows:
        try:
            if not isinstance(row, dict):
                raise msgspec.ValidationError(f"Expected an object, got `{type(row).__name__}`")
            record = msgspec.convert(_typed(prepare(row), kind), kind)
            bad = check(record) or _not_unicode(record)
        except msgspec.ValidationError as problem:
            why, _, field = str(problem).partition(" - at `$.")
            bad = BadField(field.rstrip("`"), why)
        if bad is not None:
            name = f", field '{bad.field}'" if bad.field else ""
            remedy = f"the task {task} reads {', '.join(item.encode_name for item in msgspec.structs.fields(kind))}"
            raise DataError(f"{place}{name} is malformed", why=bad.why, remedy=remedy)
        checked.append(record)
    if not checked:
        raise DataError(f"{path or source.hub} has no records")
    return checked[: limit or None]


def first_record(path: str) -> Any:
    """The first record of a local file, from which its form can be told; the rest is neither read nor checked.

    Raises:
        DataError: the file is missing, can't be read, or has no record.
    """
    path = str(Path(path).expanduser())
    for _, row in _local(path):
        return row
    raise DataError(f"{path} has no records")


def read_text(path: str) -> str:
    """A user's own text: a plain file as it is, or the ``text`` fields of a json, jsonl, csv or parquet one."""
    path = str(Path(path).expanduser())
    if Path(path).suffix.lower() in _READERS:
        rows = _local(path)
        parts = []
        for place, row in rows:
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{place}, field 'text' is malformed", why="it is missing or not a text")
            parts.append(text)
        return "\n\n".join(parts)
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise _unreadable(path, problem) from None


def digest_of(path: str) -> str:
    """sha256 of a local file's bytes.

    Raises:
        DataError: it can't be read.
    """
    path = str(Path(path).expanduser())
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise _unreadable(path, problem) from None


def hub_text(task: str, source: Source) -> str:
    """The ``text`` fields of a hub data set, one a line."""
    return "\n".join(row["text"] for _, row in _hub(task, source) if isinstance(row.get("text"), str))


def _typed(row: Row, kind: type[msgspec.Struct]) -> Row:
    """The row with lists and objects decoded that a csv file stores as JSON, and without empty fields."""
    typed = dict(row)
    for item in msgspec.structs.fields(kind):
        value = row.get(item.encode_name)
        if item.type is str or not isinstance(value, str):
            continue
        if not value:
            del typed[item.encode_name]
        elif value[0] in "[{":
            with suppress(json.JSONDecodeError):
                typed[item.encode_name] = json.loads(value)
    return typed


def _not_unicode(record: msgspec.Struct) -> BadField | None:
    """A field whose text can't be encoded: JSON allows half of a surrogate pair, which no tokenizer accepts."""
    for item in msgspec.structs.fields(record):
        try:
            str(getattr(record, item.name)).encode()
        except UnicodeEncodeError as problem:
            return BadField(item.encode_name, f"it is not valid Unicode: {problem.reason}")
    return None


def _local(path: str) -> Iterator[tuple[str, Any]]:
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise DataError(f"can't tell the format of {path}", remedy=f"name it *{', *'.join(_READERS)}")
    with reading(path):
        yield from _READERS[suffix](path)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what goes wrong while a local file is read into one line that names the file.

    Raises:
        DataError: the file can't be read or is not what its name says.
    """
    try:
        yield
    except json.JSONDecodeError as problem:
        raise DataError(f"{path} line {problem.lineno} is not valid JSON", why=problem.msg) from None
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError) as problem:
        raise _unreadable(path, problem) from None


def _json(path: str) -> Iterator[tuple[str, Any]]:
    content = json.loads(Path(path).read_text("utf-8"))
    lists = [content] if isinstance(content, list) else []
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
    if len(lists) != 1:
        raise DataError(f"{path} holds no list of records", remedy="give a list, or an object with one list in it")
    for number, row in enumerate(lists[0], 1):
        yield f"{path} record {number}", row


def _jsonl(path: str) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"{path} line {number}", json.loads(line)
            except json.JSONDecodeError as problem:
                raise DataError(f"{path} line {number} is not valid JSON", why=problem.msg) from None


def _csv(path: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                why = "it has not as many fields as the header"
                raise DataError(f"{path} line {reader.line_num} is malformed", why=why)
            yield f"{path} line {reader.line_num}", row


def _parquet(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as problem:
        raise DataError(f"can't read {path}", why=str(problem).splitlines()[0]) from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path} row {number}", row


_READERS: dict[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip


def _hub(task: str, source: Source) -> Iterator[tuple[str, Any]]:
    try:
        rows = _archived(source) if source.archive else _split(source)
    except Exception as problem:  # the library and its network layers raise many kinds; the remedy is the same
        raise DataError(
            f"the data set {source.hub} of the task {task} can't be fetched",
            why=(str(problem).splitlines() or [type(problem).__name__])[0][:200],
            remedy=f"connect once to huggingface.co without HF_HUB_OFFLINE, or give a local file: --data {task}=FILE",
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source.hub} record {number}", row


def _split(source: Source) -> Iterable[Any]:
    import datasets
    from huggingface_hub.utils import logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    rows: Iterable[Any] = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    return rows


def _archived(source: Source) -> Iterable[Any]:
    """The records of a packed data set, read from the cached archive: ``datasets`` would need the network each time."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(source.hub, source.archive, repo_type="dataset", revision=source.revision)
    with zipfile.ZipFile(path) as archive:
        return [json.loads(line) for line in archive.read(source.member).splitlines() if line.strip()]


def _unreadable(path: str, problem: Exception) -> DataError:
    why = getattr(problem, "strerror", None) or str(problem)
    return DataError(f"can't read {path}", why=why, remedy="check the path and the file")
