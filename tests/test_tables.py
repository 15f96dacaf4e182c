"""Tables of the user: spelling, encodings, delimiters, and what is reported instead of dropped."""

from __future__ import annotations

import datetime
import unicodedata

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nic_core.cohort import CohortError
from nic_core.cohort.fields import normalise
from nic_core.cohort.tables import (
    NumberError,
    existing_path,
    read_table,
    require_columns,
    suggestion,
    to_numbers,
    unmatched,
)


def written(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encodings_and_delimiters_give_the_same_table(tmp_path, encoding, delimiter):
    text = "slide,patient\n007, Müller \n008,\u00a0b\n".replace(",", delimiter)
    table = read_table(written(tmp_path / "t.csv", text, encoding), "slide table")
    assert table.rows() == [("007", "Müller"), ("008", "b")]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_endings_and_declared_delimiters_are_read(tmp_path, ending):
    text = ending.join(["sep=;", '"slide";"a, b"', '1;"x', 'y"', "", "2;z", ""])
    table = read_table(written(tmp_path / "t.csv", text), "slide table", row_column="row")
    assert table["slide"].to_list() == ["1", "2"]
    assert table["a, b"].to_list() == [f"x{ending}y", "z"]
    assert table["row"].to_list() == [3, 5]


def test_the_delimiter_is_the_one_that_fits_every_row(tmp_path):
    text = "slide;H&E, score\na;1\nb;2\n"
    table = read_table(written(tmp_path / "t.csv", text), "slide table")
    assert table.columns == ["slide", "H&E, score"]


def test_decomposed_and_composed_umlauts_are_equal(tmp_path):
    text = unicodedata.normalize("NFD", "Präparat,Wert\nMüller,1\n")
    table = read_table(written(tmp_path / "t.csv", text), "label table")
    assert table.columns == ["Präparat", "Wert"]
    assert table.rows() == [("Müller", "1")]


def test_parquet_text_is_normalised_too(tmp_path):
    pl.DataFrame({"slide ": ["a ", " b", "  "], "y": [1, 2, None]}).write_parquet(
        tmp_path / "t.parquet"
    )
    table = read_table(tmp_path / "t.parquet", "label table")
    assert table.to_dict(as_series=False) == {"slide": ["a", "b"], "y": [1, 2]}


def test_whole_numbers_of_a_parquet_float_column_are_integers(tmp_path):
    frame = pl.DataFrame({"id": [7.0, None, 8.0], "y": [0.5, float("nan"), 1.0]})
    frame.write_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", "label table")
    assert table.to_dict(as_series=False) == {"id": [7, 8], "y": [0.5, 1.0]}
    assert table.schema["id"] == pl.Int64


@pytest.mark.parametrize("dtype", [pl.Categorical, pl.Enum(["a ", "b"])])
def test_parquet_categories_are_text(tmp_path, dtype):
    pl.DataFrame({"slide": pl.Series(["a ", "b"], dtype=dtype)}).write_parquet(
        tmp_path / "t.parquet"
    )
    assert read_table(tmp_path / "t.parquet", "label table")["slide"].to_list() == ["a", "b"]


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["1", "2.5", "-.5e1", None, "NA"], [1, 2.5, -5, None, None]),
        (["0,5", "1,234", "7"], [0.5, 1.234, 7]),
        (["1,5", "-2,25"], [1.5, -2.25]),
    ],
)
def test_numbers_have_a_point_or_a_proven_decimal_comma(texts, numbers):
    assert to_numbers(pl.Series(texts, dtype=pl.String)).to_list() == numbers


@pytest.mark.parametrize(
    ("values", "index", "message"),
    [
        (["1", "x"], 1, "'x' is not a finite number"),
        (["1", "1e999"], 1, "'1e999' is not a finite number"),
        (["1,234", "22,500"], 0, "as 1.234 or as 1234"),
        (["1.5", "0,5"], 1, "'0,5' has a comma and '1.5' of the same column a point"),
        (["1.234,5"], 0, "is not a finite number"),
        (["1_0"], 0, "is not a finite number"),
        ([None, datetime.date(2020, 1, 2)], 1, "a date"),
        ([None, True], 1, "true or false"),
        ([[1], [2]], 0, "List"),
    ],
)
def test_a_value_that_is_not_a_number_is_named(values, index, message):
    with pytest.raises(NumberError, match=message) as caught:
        to_numbers(pl.Series(values))
    assert caught.value.index == index


@pytest.mark.parametrize(
    ("start", "remedy"),
    [(b"PK\x03\x04", "Excel"), (b"\x1f\x8b", "decompress"), (b"PAR1", "suffix .parquet")],
)
def test_a_file_of_another_format_is_refused_with_the_remedy(tmp_path, start, remedy):
    (tmp_path / "t.csv").write_bytes(start + bytes(9))
    with pytest.raises(CohortError, match=remedy):
        read_table(tmp_path / "t.csv", "slide table")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty"),
        ("a,b\n1\n", "row 2 has 1 values, the header has 2"),
        ("a,b\n1,2,3\n", "row 2 has 3 values"),
        ("a,a \n1,2\n", "two columns are called 'a'"),
        (",b\n1,2\n", "a column has no name"),
        ('a,b\n"1,2\n', "not a CSV file"),
        ("a\0,b\n", "not a CSV file"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(tmp_path, text, message):
    with pytest.raises(CohortError, match=message):
        read_table(written(tmp_path / "t.csv", text), "slide table")


def test_text_in_another_encoding_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(CohortError, match="save it as CSV UTF-8"):
        read_table(written(tmp_path / "t.csv", "slide\nMüller\n", "latin-1"), "slide table")


@pytest.mark.parametrize("name", ["a[1]?.csv", "ü #%20*.csv", "with blank.csv"])
def test_paths_with_special_characters_are_read(tmp_path, name):
    assert read_table(written(tmp_path / name, "slide\na\n"), "slide table").height == 1
    pl.DataFrame({"slide": ["a"]}).write_parquet(tmp_path / f"{name}.parquet")
    assert read_table(tmp_path / f"{name}.parquet", "slide table").height == 1


def test_a_missing_column_suggests_one_that_is_spelled_alike(tmp_path):
    table = pl.DataFrame({"Slide": ["a"]})
    with pytest.raises(CohortError, match="did you mean 'Slide'"):
        require_columns(table, ["slide"], tmp_path, "slide table")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("S1", "s1"),
        ("a.svs", "a"),
        ("a.ome.tif", "a"),
        ("12.0", "12"),
        ("7", "007"),
        ("7.0", "07"),
        ("a_1", "a-1"),
        ("a-1", "a1"),
        ("TCGA-1", "TCGA-1-01Z.svs"),
        ("TCGA-1-01Z", "TCGA-1"),
    ],
)
def test_ids_that_differ_in_case_or_suffix_are_suggested(name, other):
    assert suggestion(name, [other, "zz"]) == other
    assert [str(item) for item in unmatched([name], [other])] == [f"{name} (is it {other}?)"]


def test_invisible_characters_inside_an_id_are_shown(tmp_path):
    found = unmatched(["a\u200bb", "a\u00a0c"], {"ab", "a c"})
    assert [str(item) for item in found] == ["a\\u200bb (is it ab?)", "a\\u00a0c (is it a c?)"]


def test_an_ambiguous_suggestion_is_not_made():
    assert suggestion("A", ["a", "a.svs"]) is None


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.text(max_size=8)).map(
            lambda row: tuple(value.replace("\0", "") for value in row)
        ),
        max_size=8,
    )
)
def test_every_row_with_a_value_is_kept(tmp_path_factory, rows):
    import csv

    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("slide", "patient"), *rows])
    kept = [tuple(normalise(value) or None for value in row) for row in rows]
    kept = [row for row in kept if any(value is not None for value in row)]
    assert read_table(path, "slide table").rows() == kept


def test_a_path_is_found_in_another_unicode_form(tmp_path):
    stored = tmp_path / unicodedata.normalize("NFD", "Müller") / "a.tif"
    stored.parent.mkdir()
    stored.touch()
    written_as = tmp_path / unicodedata.normalize("NFC", "Müller") / "a.tif"
    assert existing_path(written_as) == stored
    assert existing_path(tmp_path / "no" / "a.tif") == tmp_path / "no" / "a.tif"
