import pytest

from nic_core.store import Store, whole_file, whole_folder


def test_a_file_is_not_there_before_it_is_whole(tmp_path):
    path = tmp_path / "a" / "table.parquet"
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.suffix == ".parquet"
    assert path.read_text() == "half"
    assert [p.name for p in path.parent.iterdir()] == ["table.parquet"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "table.parquet"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.parquet"]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    path = tmp_path / "grid.zarr"
    for content in ("first", "second"):
        with whole_folder(path) as temporary:
            (temporary / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.zarr"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    path = tmp_path / "grid.zarr"
    with whole_folder(path) as temporary:
        (temporary / "chunk").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(path) as temporary:
        (temporary / "chunk").write_text("new")
        raise RuntimeError
    assert (path / "chunk").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.zarr"]


def test_the_environment_names_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("NIC_STORE", str(tmp_path))
    store = Store.from_environment()
    assert store.grid("mtl-4", "s1") == tmp_path / "grids" / "mtl-4" / "s1.zarr"
