"""Tables of the user: spelling, encodings, delimiters, and what is reported instead of dropped."""

from __future__ import annotations

import unicodedata

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nic_core.cohort import CohortError
from nic_core.cohort.fields import normalise
from nic_core.cohort.tables import existing_path, read_table, require_columns, suggestion, unmatched


def written(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encodings_and_delimiters_give_the_same_table(tmp_path, encoding, delimiter):
    text = "slide,patient\n007, Müller \n008,\u00a0b\n".replace(",", delimiter)
    table = read_table(written(tmp_path / "t.csv", text, encoding), "slide table")
    assert table.rows() == [("007", "Müller"), ("008", "b")]


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
