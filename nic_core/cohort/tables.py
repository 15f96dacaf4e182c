"""Tables that the user writes: slide tables, label tables, patch tables of a task, patients.

A table is CSV (comma, semicolon or tab) or parquet. Column names and text values are compared after
surrounding white space is removed and Unicode is normalised (NFC), because editors and file systems
differ in both without showing it. What then still differs, if only in case or by a suffix, is a
different name: it is reported with a suggestion and never matched.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nic_core.cohort.fields import CohortError, normalise

MISSING = ("", "NA", "N/A", "n/a", "na", "nan", "NaN", "null", "NULL", "None")
"""Text that means 'no value', unless a target lists it as a class."""

_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Unmatched:
    """An id of one table that has no partner in another.

    Attributes
    ----------
    name
        The id, as it is after normalisation.
    suggestion
        An id of the other table that differs only in case, a suffix or a decimal point; None if
        there is no such id.
    """

    name: str
    suggestion: str | None

    def __str__(self) -> str:
        return self.name if self.suggestion is None else f"{self.name} (is it {self.suggestion}?)"


def read_table(path: Path, what: str) -> pl.DataFrame:
    """Read a table with normalised column names and text.

    CSV columns are all text: an id such as 007 keeps its zeros, and a wrong number can be named.
    Empty text is null. Rows without any value are left out.

    Parameters
    ----------
    path
        ``.parquet``, or CSV in UTF-8 with any other suffix.
    what
        The table's role, for errors: ``slide table``.

    Raises
    ------
    CohortError
        The file cannot be read, is not UTF-8, has rows of different length, a column without a
        name, or two columns with the same name.
    """
    try:
        table = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path, what)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise CohortError(f"{what} {path}: cannot be read ({reason})") from error
    table.columns = _unique_names(table.columns, path, what)
    text = [name for name, dtype in table.schema.items() if dtype in (pl.String, pl.Categorical)]
    table = table.with_columns(
        pl.col(name)
        .cast(pl.String)
        .map_elements(lambda value: normalise(value) or None, return_dtype=pl.String)
        for name in text
    )
    return table.filter(pl.any_horizontal(pl.all().is_not_null())) if table.width else table


def existing_path(path: Path) -> Path:
    """Return ``path`` as the file system spells it.

    macOS and some network file systems store names in another Unicode form than the table has
    them. If ``path`` does not exist, each of its parts is looked up by its normalised name. ASCII
    has one form: such a path is returned without a look at the disk, since the scan for changed
    files calls this for every slide, every minute.
    """
    if str(path).isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        here = found / part
        if not here.exists() and found.is_dir():
            equal = [item for item in found.iterdir() if normalise(item.name) == normalise(part)]
            here = equal[0] if len(equal) == 1 else here
        found = here
    return found


def require_columns(table: pl.DataFrame, columns: Iterable[str], path: Path, what: str) -> None:
    """Raise :class:`CohortError` if a column is missing; the message suggests a similar one."""
    for column in columns:
        if column not in table.columns:
            near = suggestion(column, table.columns)
            hint = f"; did you mean '{near}'?" if near else ""
            raise CohortError(
                f"{what} {path}: no column '{column}'; it has {', '.join(table.columns)}{hint}"
            )


def unmatched(names: Iterable[str], known: Collection[str]) -> list[Unmatched]:
    """The ``names`` that are not ``known``, each once and in order, with suggestions."""
    absent = [name for name in dict.fromkeys(names) if name not in known]
    by_core: dict[str, list[str]] = {}
    for name in known if absent else ():
        by_core.setdefault(_core(name), []).append(name)
    return [Unmatched(name, _only(by_core.get(_core(name), []))) for name in absent]


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """The one known name that differs from ``name`` only in case, a suffix or a decimal point."""
    core = _core(name)
    return _only([other for other in known if _core(other) == core and other != name])


def _core(name: str) -> str:
    """What two spellings of one id have in common: no case, file ending, separator or '.0'."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = re.sub(r"\.ome(?=\.|$)", "", text)
    text = re.sub(r"\.(svs|tiff?|ndpi|mrxs|scn|bif|dcm|czi|vsi|isyntax|png|jpe?g|zarr)$", "", text)
    text = re.sub(r"\.0+$", "", text)
    return re.sub(r"[\s_\-]+", "", text)


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _read_parquet(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path, glob=False)


def _read_csv(path: Path, what: str) -> pl.DataFrame:
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CohortError(
            f"{what} {path}: not UTF-8 text (byte {error.start}); save it as CSV UTF-8"
        ) from error
    if "\0" in text:
        raise CohortError(f"{what} {path}: not a CSV file (it contains zero bytes)")
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=header.count) if header else ","
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise CohortError(f"{what} {path}: not a CSV file ({error})") from error
    numbered = [
        (number, row) for number, row in enumerate(rows, start=1) if any(map(str.strip, row))
    ]
    if not numbered:
        raise CohortError(f"{what} {path}: the table is empty; write a header and one row a line")
    (_, names), *body = numbered
    while names and not names[-1].strip():  # an editor's trailing delimiters
        names.pop()
    if not all(name.strip() for name in names):
        raise CohortError(f"{what} {path}: a column has no name; name every column of the header")
    for number, row in body:
        extra = [value for value in row[len(names) :] if value.strip()]
        if len(row) < len(names) or extra:
            raise CohortError(
                f"{what} {path}: row {number} has {len(row)} values, the header has {len(names)}"
            )
    columns = {
        str(i): pl.Series([row[i] for _, row in body], dtype=pl.String) for i in range(len(names))
    }
    table = pl.DataFrame(columns)
    table.columns = _unique_names(names, path, what)
    return table


def _unique_names(names: Sequence[str], path: Path, what: str) -> list[str]:
    """Return the names of columns, normalised; raise if two are equal then."""
    normal = [normalise(name) for name in names]
    for name in normal:
        if normal.count(name) > 1:
            raise CohortError(f"{what} {path}: two columns are called '{name}'; rename one")
    return normal
