"""Staleness of all partitions at once, compared with Dagster's own result for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContext
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_assets.assets.inputs import ENCODER_ENTRY, SLIDE_FILE, report_versions
from nic_assets.orchestration.staleness import materialization_history, stale_assets
from tests.assets.worlds import ENCODERS, SLIDE_KEYS, World


@dataclass
class Lookups(LoadingContext):
    """The context that Dagster's resolver needs: an instance and a cache."""

    dagster_instance: dg.DagsterInstance
    cache: dict[type, Any] = field(default_factory=dict)

    @property
    def instance(self) -> dg.DagsterInstance:
        return self.dagster_instance

    @property
    def loaders(self) -> dict[type, Any]:
        return self.cache


def dagsters_result(world: World) -> dict[tuple[str, str | None], str]:
    graph = world.definitions().resolve_asset_graph()
    resolver = CachingStaleStatusResolver(world.instance, graph, Lookups(world.instance))
    return {
        (key.to_user_string(), partition): resolver.get_status(key, partition).value
        for key, partition in world.partitions(graph)
    }


def our_result(world: World) -> dict[tuple[str, str | None], str]:
    graph = world.definitions().resolve_asset_graph()
    history = materialization_history(world.instance)
    history.update(world.instance, graph)
    with dg.partition_loading_context(dynamic_partitions_store=world.instance):
        return {
            (key.to_user_string(), partition): history.status(graph, key, partition)
            for key, partition in world.partitions(graph)
        }


events = st.one_of(
    st.tuples(st.just("slide"), st.sampled_from(SLIDE_KEYS), st.sampled_from("ab")),
    st.tuples(st.just("encoder"), st.sampled_from(ENCODERS), st.sampled_from("ab")),
    st.tuples(st.just("make"), st.sampled_from(("mask", "encoder", "grid", "gathered"))),
    st.tuples(st.just("code"), st.sampled_from("12")),
)


@pytest.mark.slow
@settings(max_examples=8)
@given(st.lists(events, max_size=8))
def test_staleness_equals_dagsters_after_any_events(happened):
    world = World()
    for kind, *about in happened:
        if kind == "slide":
            world.slides[about[0]] = about[1]
            world.scan()
        elif kind == "encoder":
            world.encoders[about[0]] = about[1]
            world.scan()
        elif kind == "code":
            world.code = about[0]
        else:
            world.make(*about)
        assert our_result(world) == dagsters_result(world)


def test_a_wiped_asset_is_missing_again():
    world = World()
    world.make_all()
    assert "MISSING" not in our_result(world).values()
    world.instance.wipe_assets([dg.AssetKey("grid")])
    missing = {name for (name, _), status in our_result(world).items() if status == "MISSING"}
    assert missing == {"grid"}


@pytest.mark.slow
def test_a_summary_of_over_100_slides_is_stale_when_one_changes():
    world = World(f"s{number:03d}" for number in range(120))
    world.make_all()
    assert set(our_result(world).values()) == {"FRESH"}
    world.slides["s077"] = "b"
    world.scan()
    world.make("mask", "s077")
    world.make("grid", "first|s077")
    stale = {name for name, status in our_result(world).items() if status == "STALE"}
    assert stale == {("gathered", "first"), ("grid", "second|s077")}
    # Dagster itself ignores dependencies on 100 partitions or more
    assert dagsters_result(world)["gathered", "first"] == "FRESH"


def test_partitions_wait_for_stale_partitions_upstream():
    world = World()
    world.make_all()
    world.slides["s1"] = "b"
    world.scan()
    stale = stale_assets(world.instance, world.definitions().resolve_asset_graph())
    assert stale[dg.AssetKey("mask")].ready == {"s1"}
    # the grids of a changed slide are stale too, but its mask comes first
    assert stale[dg.AssetKey("grid")].ready == set()
    assert stale[dg.AssetKey("grid")].blocked_by_upstream == {"first|s1", "second|s1"}


def test_a_failed_partition_blocks_nothing_until_its_input_changes():
    world = World()
    world.make_all()
    world.slides["s1"] = "b"
    world.bad = {"s1"}
    world.scan()
    world.make("mask", "s1")
    graph = world.definitions().resolve_asset_graph()
    grid = stale_assets(world.instance, graph)[dg.AssetKey("grid")]
    assert grid.ready == {"first|s1", "second|s1"}
    report_versions(world.instance, SLIDE_FILE, {"s1": "c"})
    grid = stale_assets(world.instance, graph)[dg.AssetKey("grid")]
    assert grid.ready == set()


def test_a_partition_without_its_input_is_not_ready():
    world = World()
    report_versions(world.instance, ENCODER_ENTRY, world.encoders)
    stale = stale_assets(world.instance, world.definitions().resolve_asset_graph())
    assert stale[dg.AssetKey("mask")].ready == set(SLIDE_KEYS)
    assert len(stale[dg.AssetKey("grid")].missing_inputs) == len(SLIDE_KEYS) * len(ENCODERS)
    assert stale[dg.AssetKey("gathered")].missing_inputs == set(ENCODERS)
