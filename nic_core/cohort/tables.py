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
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nic_core.cohort.fields import INVISIBLE, CohortError, did_you_mean, normalise

MISSING = ("NA", "N/A", "#N/A", "<NA>", "n/a", "na", "nan", "NaN", "null", "NULL", "None")
"""Text that means 'no value', unless a target lists it as a class. Empty text always does."""

ROW = " row"
"""Column for the number of a row in messages; no column of a table begins with a blank."""

_DELIMITERS = ",;\t"
_OTHER_FORMATS = {
    b"PK\x03\x04": "an Excel or OpenDocument file; save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel file; save it as CSV UTF-8",
    b"\x1f\x8b": "a compressed file; decompress it",
    b"PAR1": "a parquet file; give it the suffix .parquet",
}
"""First bytes of files that may be given as a CSV table by mistake."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_COMMA_NUMBER = re.compile(r"[+-]?(\d+,\d*|,\d+)([eE][+-]?\d+)?", re.ASCII)
_AMBIGUOUS_COMMA = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)  # 1,234 is 1.234 or 1234
_EXACT = 2.0**53  # float64 holds every integer up to here


@dataclass(frozen=True)
class Unmatched:
    """An id of one table that has no partner in another.

    Attributes
    ----------
    name
        The id, as it is after normalisation.
    suggestion
        The only id of the other table that differs in case, a suffix, leading zeros or invisible
        characters alone; None if there is no such id, or more than one.
    """

    name: str
    suggestion: str | None

    def __str__(self) -> str:
        if self.suggestion is None:
            return visible(self.name)
        return f"{visible(self.name)} (is it {visible(self.suggestion)}?)"


class NumberError(ValueError):
    """A value of a column is not a finite number.

    Attributes
    ----------
    index
        Position of the value in the column, from 0.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(problem)
        self.index = index


def read_table(path: Path, what: str, *, row_column: str | None = None) -> pl.DataFrame:
    """Read a table with normalised column names and text.

    CSV columns are all text: an id such as 007 keeps its zeros, and a wrong number can be named.
    Parquet columns keep their types, except that NaN is null and that floating-point numbers which
    are all whole become integers (pandas stores a column of integers with a gap as 7.0; the id is
    7). Empty text is null. Rows without any value are left out.

    Parameters
    ----------
    path
        ``.parquet``, or CSV in UTF-8 with any other suffix.
    what
        The table's role, for errors: ``slide table``.
    row_column
        Name of an additional column (int64) with the number of each row: in CSV as a spreadsheet
        shows it, where the header is row 1 (blank lines count); in parquet from 1.

    Raises
    ------
    CohortError
        The file cannot be read, is not UTF-8, has rows of different length, a column without a
        name, or two columns with the same name.
    """
    try:
        table, rows = _read_parquet(path) if _is_parquet(path) else _read_csv(path, what)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise CohortError(f"{what} {path}: cannot be read ({reason})") from error
    table.columns = _unique_names(table.columns, path, what)
    if not table.width:
        return table
    table = table.with_columns(_normalised(column) for column in table)
    filled = table.select(pl.any_horizontal(pl.all().is_not_null())).to_series()
    if row_column is not None:
        table = table.with_columns(rows.alias(row_column))
    return table.filter(filled)


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
            hint = (
                f"; did you mean '{visible(near)}'?"
                if near
                else did_you_mean(column, table.columns)
            )
            names = ", ".join(map(visible, table.columns))
            raise CohortError(f"{what} {path}: no column '{column}'; it has {names}{hint}")


def to_text(column: pl.Series) -> pl.Series:
    """Return a column of ids or classes as text: dates in ISO form, ``true`` and ``false``.

    Raises
    ------
    TypeError
        The column holds lists, records or bytes.
    """
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
        raise TypeError(f"holds {column.dtype} instead of text; write it as text")
    return column.cast(pl.String)


def to_numbers(column: pl.Series) -> pl.Series:
    """Return a column as float64; null where the value is missing (:data:`MISSING`).

    Text is a number with a decimal point. A decimal comma is read if no number of the column has
    a decimal point, and one of them cannot have a separator of thousands: ``0,5`` in a column
    proves that ``1,234`` is 1.234 there.

    Raises
    ------
    NumberError
        A value is not a finite number, or its comma has two readings.
    """
    if column.dtype.is_temporal():
        kind = "a date, a time or a duration"
    elif column.dtype == pl.Boolean:
        kind = "true or false"
    elif column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
        kind = f"of type {column.dtype}"
    else:
        kind = ""
    if kind and column.null_count() < len(column):
        first = column.is_not_null().arg_max()
        assert first is not None  # a value is not null
        raise NumberError(first, f"'{column[first]}' is {kind}, not a number")
    if column.dtype == pl.String:
        numbers = _parsed([None if value in MISSING else value for value in column])
    else:
        numbers = column.cast(pl.Float64).to_list()
    for index, number in enumerate(numbers):
        if number is not None and abs(number) == float("inf"):
            raise NumberError(index, f"'{column[index]}' is not a finite number")
    return pl.Series(column.name, numbers, pl.Float64)


def unmatched(names: Iterable[str], known: Collection[str]) -> list[Unmatched]:
    """The ``names`` that are not ``known``, each once and in order, with suggestions."""
    absent = [name for name in dict.fromkeys(names) if name not in known]
    if not absent:
        return []
    by_core: dict[str, list[str]] = {}
    by_bare_core: dict[str, list[str]] = {}
    for other in known:
        core = _core(other)
        by_core.setdefault(core, []).append(other)
        by_bare_core.setdefault(core.replace("-", ""), []).append(other)
    cores = sorted(by_core)

    def nearest(core: str) -> str | None:
        """The only name with this core; if there is none, the only one that differs by a suffix."""
        found = by_bare_core.get(core.replace("-", ""), [])
        if not found and core:
            for mark in "-.":
                start, end = (bisect_left(cores, core + m) for m in (mark, chr(ord(mark) + 1)))
                found = found + [name for other in cores[start:end] for name in by_core[other]]
            cuts = [match.start() for match in re.finditer(r"[-.]", core)]
            found = found + [name for cut in cuts for name in by_core.get(core[:cut], [])]
        return found[0] if len(found) == 1 else None

    return [Unmatched(name, nearest(_core(name))) for name in absent]


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """The suggestion of :class:`Unmatched` for one name among the ``known`` ones but itself."""
    return unmatched([name], {other for other in known if other != name})[0].suggestion


def same_spelling(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that differ only as :class:`Unmatched` describes; None: none do.

    They differ in case, leading zeros, ``.0`` or invisible characters alone.
    """
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        other = seen.setdefault(_core(name), name)
        if other != name:
            return other, name
    return None


def visible(text: str) -> str:
    """Return ``text`` with escapes for what does not print: ``a\\u200b`` for a zero width space."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _core(name: str) -> str:
    """What spellings of one id share: no case, file ending, leading zeros, '.0', invisible marks.

    White space, '_' and '-' count as one mark.
    """
    text = unicodedata.normalize("NFKC", name).casefold()
    text = text.translate(dict.fromkeys(map(ord, INVISIBLE)))
    text = re.sub(r"\.ome(?=\.|$)", "", text)
    text = re.sub(r"\.(svs|tiff?|ndpi|mrxs|scn|bif|dcm|czi|vsi|isyntax|png|jpe?g|zarr)$", "", text)
    text = re.sub(r"\.0+$", "", text)
    text = re.sub(r"(?<!\d)0+(?=\d)", "", text)
    return re.sub(r"[\s_\-]+", "-", text).strip("-")


def _normalised(column: pl.Series) -> pl.Series:
    """Normalise text; make NaN null and floating-point numbers that are all whole integers."""
    if column.dtype in (pl.String, pl.Categorical, pl.Enum):
        texts = (None if v is None else normalise(v) or None for v in column.cast(pl.String))
        return pl.Series(column.name, list(texts), pl.String)
    if not column.dtype.is_float():
        return column
    column = column.fill_nan(None)
    values = column.drop_nulls()
    whole = ((values.abs() < _EXACT) & (values == values.round())).all()
    return column.cast(pl.Int64) if whole else column


def _parsed(texts: Sequence[str | None]) -> list[float | None]:
    """Numbers of texts; see :func:`to_numbers`."""
    commas = [t for t in texts if t is not None and _COMMA_NUMBER.fullmatch(t)]
    points = [t for t in texts if t is not None and "." in t]
    proven = any(not _AMBIGUOUS_COMMA.fullmatch(t) for t in commas)
    numbers: list[float | None] = []
    for index, text in enumerate(texts):
        if text is None:
            numbers.append(None)
        elif _NUMBER.fullmatch(text):
            numbers.append(float(text))
        elif not _COMMA_NUMBER.fullmatch(text):
            raise NumberError(index, f"'{visible(text)}' is not a finite number")
        elif points:
            raise NumberError(
                index,
                f"'{text}' has a comma and '{visible(points[0])}' of the same column a point; "
                "write all numbers with a decimal point and without separators of thousands",
            )
        elif not proven:
            raise NumberError(
                index,
                f"'{text}' can be read as {text.replace(',', '.')} or as {text.replace(',', '')}; "
                "write all numbers with a decimal point and without separators of thousands",
            )
        else:
            numbers.append(float(text.replace(",", ".")))
    return numbers


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _read_parquet(path: Path) -> tuple[pl.DataFrame, pl.Series]:
    """Return the table and the number of each row."""
    if not path.is_file():  # polars reads all files of a folder
        raise FileNotFoundError(2, "no such file", str(path))
    table = pl.read_parquet(path, glob=False)
    return table, pl.Series(range(1, table.height + 1), dtype=pl.Int64)


def _read_csv(path: Path, what: str) -> tuple[pl.DataFrame, pl.Series]:
    """Return the table, all text, and the number of each row."""
    data = path.read_bytes()
    for start, remedy in _OTHER_FORMATS.items():
        if data.startswith(start):
            raise CohortError(f"{what} {path}: not a CSV file but {remedy}")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CohortError(
            f"{what} {path}: not UTF-8 text (byte {error.start}); save it as CSV UTF-8"
        ) from error
    if "\0" in text:
        raise CohortError(f"{what} {path}: not a CSV file (it contains zero bytes)")
    try:
        numbered = _best_split(text)
    except csv.Error as error:
        raise CohortError(f"{what} {path}: not a CSV file ({error})") from error
    if not numbered:
        raise CohortError(f"{what} {path}: the table is empty; write a header and one row a line")
    (_, names), *body = numbered
    while not names[-1].strip():  # an editor's trailing delimiters
        names.pop()
    if not all(normalise(name) for name in names):
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
    return table, pl.Series([number for number, _ in body], dtype=pl.Int64)


def _best_split(text: str) -> list[tuple[int, list[str]]]:
    """Split CSV text by the delimiter that fits: equal rows if possible, then most columns.

    Excel's first line ``sep=;`` names the delimiter.

    Returns
    -------
    list
        Number of the row in the file, from 1, and its values; rows without text are left out.

    Raises
    ------
    csv.Error
        The text is not CSV with any of the delimiters.
    """
    declared = re.match(r"\s*\"?sep=(.)\"?[ \t]*(\r\n|\r|\n|$)", text)
    splits, problem = [], None
    for delimiter in declared[1] if declared else _DELIMITERS:
        try:
            split = list(_numbered_rows(text, delimiter))
        except csv.Error as error:
            problem = problem or error
            continue
        splits.append(split[1:] if declared else split)
    if not splits:
        assert problem is not None
        raise problem
    return max(splits, key=lambda split: (_equal_rows(split), len(split[0][1]) if split else 0))


def _numbered_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for number, row in enumerate(reader, start=1):
        if any(value.strip() for value in row):
            yield number, row


def _equal_rows(split: Sequence[tuple[int, Sequence[str]]]) -> bool:
    """Whether there is more than one column, and every row has a value for each."""
    return len({len(row) for _, row in split}) == 1 and len(split[0][1]) > 1


def _unique_names(names: Sequence[str], path: Path, what: str) -> list[str]:
    """Return the names of columns, normalised; raise if two are equal then."""
    normal = [normalise(name) for name in names]
    for name in normal:
        if normal.count(name) > 1:
            raise CohortError(f"{what} {path}: two columns are called '{name}'; rename one")
    return normal
