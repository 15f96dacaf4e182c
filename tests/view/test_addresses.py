"""Addresses of the viewer's pages."""

import pytest

from nic_core.view.addresses import VIEW_VARIABLE, cohort_page, slide_page, target_page


@pytest.fixture(autouse=True)
def _default_address(monkeypatch):
    monkeypatch.delenv(VIEW_VARIABLE, raising=False)


def test_pages_are_on_this_machine_by_default():
    assert cohort_page() == "http://127.0.0.1:8765/"
    assert target_page("growth") == "http://127.0.0.1:8765/target/growth"


@pytest.mark.parametrize(
    "address", ["https://nic.example.org:8443", "https://nic.example.org:8443/"]
)
def test_the_variable_gives_another_address(monkeypatch, address):
    monkeypatch.setenv(VIEW_VARIABLE, address)
    assert slide_page("a") == "https://nic.example.org:8443/slide/a"


def test_names_and_layers_are_escaped():
    assert slide_page("a b/c#1", "grid.mtl,2").endswith(
        "slide/a%20b%2Fc%231#layers=grid.mtl%2C2:0.6"
    )
