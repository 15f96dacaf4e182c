"""The demo cohort: synthetic H&E slides and patches with known structures and targets."""

from nic_core.demo.cohort import make_demo

__all__ = ["make_demo"]
