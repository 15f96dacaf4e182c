"""Ranges of an object: which requests are sent for them, and what is returned."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nic_core.slides import remote
from nic_core.slides.remote import Range, RemoteFile, RemoteObject, plan_requests, slide_path
from tests.object_stores.servers import WebServer, web_server

SIZE = 300_000
ranges = st.builds(
    lambda start, length: Range(start, min(length, SIZE - start)),
    st.integers(0, SIZE - 1),
    st.integers(0, 100_000),
)


@given(st.lists(ranges, max_size=20), st.integers(0, 50_000), st.integers(1, 100_000))
def test_requests_cover_the_ranges_and_nothing_far_from_them(wanted, gap, largest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_LARGEST", largest)
        requests = plan_requests(wanted, gap)
    assert all(0 < request.length <= largest for request in requests)
    assert all(a.end <= b.start for a, b in pairwise(requests))
    asked = {byte for request in requests for byte in range(request.start, request.end)}
    needed = {byte for found in wanted for byte in range(found.start, found.end)}
    assert needed <= asked
    # every byte that was not needed lies in a gap between two ranges
    extra = sorted(asked - needed)
    runs, last = [], -2
    for byte in extra:
        if byte != last + 1:
            runs.append(0)
        runs[-1] += 1
        last = byte
    assert all(run <= gap for run in runs)


@pytest.fixture(scope="module")
def object_of_bytes(tmp_path_factory):
    pytest.importorskip("obstore", reason="no obstore: pip install 'nic-pathology[s3]'")
    folder = tmp_path_factory.mktemp("served")
    data = bytes(i * i % 251 for i in range(SIZE))
    (folder / "data").write_bytes(data)
    with web_server(folder) as server:
        yield RemoteObject(slide_path(f"{server.url}/data")), data


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ranges, max_size=8), st.integers(0, 50_000))
def test_each_range_is_returned_as_it_is_stored(object_of_bytes, wanted, gap) -> None:
    found, data = object_of_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_LARGEST", 70_000)
        read = found.read(wanted, gap=gap)
    assert read == [data[r.start : r.end] for r in wanted]


steps = st.one_of(
    st.tuples(st.just("seek"), st.integers(0, SIZE + 10), st.just(0)),
    st.tuples(st.just("seek"), st.integers(-SIZE, 0), st.just(2)),
    st.tuples(st.just("read"), st.integers(0, 200_000), st.just(0)),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=12))
def test_a_remote_file_reads_as_a_local_one(object_of_bytes, calls) -> None:
    found, data = object_of_bytes
    here, there = io.BytesIO(data), RemoteFile(found)
    for name, number, whence in calls:
        if name == "seek":
            assert there.seek(number, whence) == here.seek(number, whence)
        else:
            assert there.read(number) == here.read(number)
        assert there.tell() == here.tell()


def test_small_reads_share_a_request(web: WebServer) -> None:
    (web.folder / "data").write_bytes(bytes(SIZE))
    file = RemoteFile(RemoteObject(slide_path(f"{web.url}/data")))
    for start in range(0, 60_000, 100):
        file.seek(start)
        file.read(8)
    assert len([r for r in web.requests if r.method == "GET"]) == 1
    assert Path(file.name).name == "data"
