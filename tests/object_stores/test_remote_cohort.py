"""A study whose slides are in an object store: index, scan for changes, products, commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from nic_core import steps
from nic_core.cli import app
from nic_core.cohort import Cohort, CohortError, load_cohort
from nic_core.cohort.index import find_slides, table_rows
from nic_core.cohort.scan import scan_files
from nic_core.compression.batch import compress_slides, slides_by_id
from nic_core.grids import open_grid
from nic_core.slides import SlideSource, remote
from nic_core.slides.remote import slide_path
from nic_core.steps.slide_index import read_file_snapshot
from nic_core.store import GridKey, PatchTableKey, Store
from nic_core.view.errors import ViewError
from nic_core.view.slides import OpenSlides
from nic_core.view.study import open_study
from tests.object_stores.conftest import Bucket
from tests.object_stores.servers import WebServer
from tests.slides.conftest import paint, write_tiff

COHORT = """
name: remote
slides:
  {slides}
encoders:
  - {{name: mean-rgb, objective: mean_rgb}}
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [
        write_tiff(folder / f"{name}.tif", paint(700, 900, seed), mpp=0.5, compression="jpeg")
        for seed, name in enumerate(("a-1", "b-1"))
    ]


def study(folder: Path, slides: str) -> Cohort:
    path = folder / "cohort.yaml"
    path.write_text(COHORT.format(slides=slides))
    return load_cohort(path)


def test_a_study_of_a_bucket_has_the_products_of_a_local_one(
    bucket: Bucket, slides: list[Path], tmp_path: Path
) -> None:
    for slide in slides:
        bucket.put(slide)
    places = {"there": bucket.folder, "here": slides[0].parent}
    grids = {}
    for name, place in places.items():
        (tmp_path / name).mkdir()
        cohort = study(tmp_path / name, f"folders: [{{path: '{place}', pattern: '*.tif'}}]")
        store = Store(tmp_path / name / "store")
        index = steps.make_slide_index(cohort, store).index
        assert index["slide"].to_list() == ["a-1", "b-1"]
        assert index["path"].to_list() == [f"{place}/a-1.tif", f"{place}/b-1.tif"]
        steps.make_slide(store, "a-1")
        steps.make_patch_table(cohort, store, PatchTableKey(geometry="128px-0.5um", slide="a-1"))
        steps.make_encoder(cohort, store, "mean-rgb")
        steps.make_grid(cohort, store, steps.prepare_encoder(cohort, store, "mean-rgb"), "a-1")
        grids[name] = open_grid(store.grid(GridKey(encoder="mean-rgb", slide="a-1")))
    np.testing.assert_array_equal(grids["there"].embeddings[:], grids["here"].embeddings[:])
    assert grids["there"].valid.any()


def test_a_scan_finds_new_replaced_and_removed_objects(
    bucket: Bucket, slides: list[Path], tmp_path: Path
) -> None:
    first, second = (bucket.put(slide) for slide in slides)
    cohort, store = study(tmp_path, f"folders: [{{path: '{bucket.folder}'}}]"), Store(tmp_path)
    before = steps.make_slide_index(cohort, store)

    def changed() -> set[str]:
        remote.forget()
        fingerprints = scan_files(cohort, read_file_snapshot(store)).fingerprints
        return set(scan_files(cohort, read_file_snapshot(store), fingerprints).stable)

    assert changed() == set()
    data = bytearray(slides[0].read_bytes())
    data[-1] ^= 1  # the same size, probably in the same second
    bucket.put_bytes(first.name, bytes(data))
    third = bucket.put(slides[1], "c-1.tif")
    bucket.remove(second)
    assert changed() == {str(first), str(second), str(third)}
    after = steps.make_slide_index(cohort, store)
    assert after.index["slide"].to_list() == ["a-1", "c-1"]
    assert after.versions["a-1"] != before.versions["a-1"]
    assert after.versions["c-1"] == before.versions["b-1"]


def test_a_slide_table_names_addresses(web: WebServer, slides: list[Path], tmp_path: Path) -> None:
    for slide in slides:
        shutil.copy(slide, web.folder)
    table = tmp_path / "slides.csv"
    table.write_text(
        f"slide,path,patient\none,{web.url}/a-1.tif,p\ntwo,{web.url}/b-1.tif,p\n"
        f"lost,{web.url}/none.tif,q\nhere,{slides[0]},r\n"
    )
    found = find_slides(study(tmp_path, f"table: {table}"))
    assert set(found.problems) == {"lost"}
    assert found.problems["lost"] == f"path {web.url}/none.tif does not exist"
    paths = dict(found.index.select("slide", "path").iter_rows())
    assert paths["one"] == f"{web.url}/a-1.tif"
    assert paths["here"] == str(slides[0])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,s3://bucket//a.tif,p,", "column 'path': s3://bucket//a.tif: an address has no empty"),
        ("a,a.tif,p,s3://bucket/mask.png", "'mask': s3://bucket/mask.png is an address; only slid"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(tmp_path: Path, row: str, reason: str) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(f"slide,path,patient,mask\n{row}\n")
    with pytest.raises(CohortError, match=reason):
        table_rows(table)


def test_a_folder_that_is_no_bucket_is_refused(
    web: WebServer, bucket: Bucket, tmp_path: Path
) -> None:
    with pytest.raises(CohortError, match=f"slides.folders: {bucket.folder}/none is not a folder"):
        find_slides(study(tmp_path, f"folders: [{{path: '{bucket.folder}/none'}}]"))
    with pytest.raises(CohortError, match=f"slides.folders: {web.url}/x is not a folder"):
        find_slides(study(tmp_path, f"folders: [{{path: '{web.url}/x'}}]"))


def test_commands_take_addresses(bucket: Bucket, slides: list[Path], tmp_path: Path) -> None:
    path = bucket.put(slides[0])
    told = CliRunner().invoke(app, ["inspect", str(path)])
    assert told.exit_code == 0, told.output
    assert str(path) in told.output
    assert "TIFF tiles read by ranges" in told.output
    failed = CliRunner().invoke(app, ["inspect", f"{bucket.folder}/none.tif"])
    assert failed.exit_code == 1
    assert "No such file" in failed.output
    wrong = CliRunner().invoke(app, ["inspect", "s3://bucket//none.tif"])
    assert wrong.exit_code == 2


def test_a_slide_of_a_failing_server_fails_alone(
    web: WebServer, slides: list[Path], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    cohort = study(tmp_path, f"folders: [{{path: '{slides[0].parent}'}}]")
    steps.make_encoder(cohort, store, "mean-rgb")
    encoder = steps.prepare_encoder(cohort, store, "mean-rgb")
    shutil.copy(slides[0], web.folder)
    named = slides_by_id(SlideSource(slide_path(p)) for p in (f"{web.url}/a-1.tif", slides[1]))
    remote.forget()
    web.faults.extend(["cut"] * 1000)
    report = compress_slides(named, encoder, tmp_path / "grids")
    assert dict(report.select("slide", "status").iter_rows()) == {
        "a-1": "failed",
        "b-1": "compressed",
    }
    assert report.filter(pl.col("slide") == "a-1")["remedy"][0].endswith("run it again")


def test_the_viewer_says_that_a_server_does_not_answer(
    web: WebServer, slides: list[Path], tmp_path: Path
) -> None:
    shutil.copy(slides[0], web.folder)
    table = tmp_path / "slides.csv"
    table.write_text(f"slide,path,patient\none,{web.url}/a-1.tif,p\n")
    cohort, store = study(tmp_path, f"table: {table}"), Store(tmp_path / "store")
    steps.make_slide_index(cohort, store)
    viewed = open_study(cohort, store)
    remote.forget()
    web.faults.extend(["cut"] * 1000)
    with (
        pytest.raises(ViewError, match="its server does not answer") as raised,
        OpenSlides(viewed).get("one"),
    ):
        pass
    assert raised.value.status == 503
    assert web.url not in f"{raised.value.reason} {raised.value.remedy}"
    assert "does not answer" in viewed.failed("one").reason
    web.faults.clear()
    assert viewed.failed("one").reason == "it has no products yet"
