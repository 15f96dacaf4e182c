"""The demo cohort: a procedural H&E generator with planted structures and known targets."""

from nic_core.demo.cohort import make_demo

__all__ = ["make_demo"]
