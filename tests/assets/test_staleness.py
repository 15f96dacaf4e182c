"""Staleness of all partitions at once, against Dagster's own answer for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.loader import LoadingContext
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_assets.assets.inputs import ENCODER_ENTRY, SLIDE_FILE, report_versions
from nic_assets.orchestration.staleness import due, ledger
from tests.assets.worlds import ENCODERS, SLIDE_KEYS, World


@dataclass
class Lookups(LoadingContext):
    """What Dagster's resolver wants of a request: an instance and a cache."""

    dagster_instance: dg.DagsterInstance
    cache: dict[type, Any] = field(default_factory=dict)

    @property
    def instance(self) -> dg.DagsterInstance:
        return self.dagster_instance

    @property
    def loaders(self) -> dict[type, Any]:
        return self.cache


def dagsters_answer(world: World) -> dict[tuple[str, str | None], str]:
    graph = world.definitions().resolve_asset_graph()
    resolver = CachingStaleStatusResolver(world.instance, graph, Lookups(world.instance))
    return {
        (key.to_user_string(), partition): resolver.get_status(key, partition).value
        for key, partition in world.partitions(graph)
    }


def ours(world: World) -> dict[tuple[str, str | None], str]:
    graph = world.definitions().resolve_asset_graph()
    book = ledger(world.instance)
    book.read(world.instance, graph)
    with partition_loading_context(dynamic_partitions_store=world.instance):
        return {
            (key.to_user_string(), partition): book.status(graph, key, partition).value
            for key, partition in world.partitions(graph)
        }


events = st.one_of(
    st.tuples(st.just("slide"), st.sampled_from(SLIDE_KEYS), st.sampled_from("ab")),
    st.tuples(st.just("encoder"), st.sampled_from(ENCODERS), st.sampled_from("ab")),
    st.tuples(st.just("make"), st.sampled_from(("mask", "encoder", "grid", "gathered"))),
    st.tuples(st.just("code"), st.sampled_from("12")),
)


@settings(max_examples=8)
@given(st.lists(events, max_size=8))
def test_it_is_dagsters_answer_whatever_happened(history):
    world = World()
    for kind, *about in history:
        if kind == "slide":
            world.slides[about[0]] = about[1]
            world.look()
        elif kind == "encoder":
            world.encoders[about[0]] = about[1]
            world.look()
        elif kind == "code":
            world.code = about[0]
        else:
            world.make(*about)
        assert ours(world) == dagsters_answer(world)


def test_a_wiped_asset_is_missing_again():
    world = World()
    world.make_all()
    assert "MISSING" not in ours(world).values()
    world.instance.wipe_assets([dg.AssetKey("grid")])
    missing = {name for (name, _), status in ours(world).items() if status == "MISSING"}
    assert missing == {"grid"}


def test_a_cohort_of_more_than_a_hundred_slides_is_stale_when_one_changes():
    world = World(f"s{number:03d}" for number in range(120))
    world.make_all()
    assert set(ours(world).values()) == {"FRESH"}
    world.slides["s077"] = "b"
    world.look()
    world.make("mask", "s077")
    world.make("grid", "first|s077")
    stale = {name for name, status in ours(world).items() if status == "STALE"}
    assert stale == {("gathered", "first"), ("grid", "second|s077")}
    # which is what Dagster itself does not look at
    assert dagsters_answer(world)["gathered", "first"] == "FRESH"


def test_what_lies_below_work_to_be_done_waits_for_it():
    world = World()
    world.make_all()
    world.slides["s1"] = "b"
    world.look()
    judged = due(world.instance, world.definitions().resolve_asset_graph())
    assert judged[dg.AssetKey("mask")].ready == {"s1"}
    # of a changed slide the grid is stale too, but its mask comes first
    assert judged[dg.AssetKey("grid")].ready == set()
    assert judged[dg.AssetKey("grid")].early == {"first|s1", "second|s1"}


def test_what_has_failed_holds_nothing_back_until_its_input_changes():
    world = World()
    world.make_all()
    world.slides["s1"] = "b"
    world.bad = {"s1"}
    world.look()
    world.make("mask", "s1")
    graph = world.definitions().resolve_asset_graph()
    assert due(world.instance, graph)[dg.AssetKey("grid")].ready == {"first|s1", "second|s1"}
    report_versions(world.instance, SLIDE_FILE, {"s1": "c"})
    assert due(world.instance, graph)[dg.AssetKey("grid")].ready == set()


def test_a_partition_without_its_input_waits():
    world = World()
    report_versions(world.instance, ENCODER_ENTRY, world.encoders)
    judged = due(world.instance, world.definitions().resolve_asset_graph())
    assert judged[dg.AssetKey("mask")].ready == set(SLIDE_KEYS)
    assert len(judged[dg.AssetKey("grid")].waiting) == len(SLIDE_KEYS) * len(ENCODERS)
    assert judged[dg.AssetKey("gathered")].waiting == set(ENCODERS)
