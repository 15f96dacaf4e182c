"""The demo cohort: synthetic H&E slides and patches with known structures and targets.

Composed slides have the same layout and targets, but consist of real tissue.
"""

from nic_core.demo.cohort import make_demo
from nic_core.demo.composed import make_composed

__all__ = ["make_composed", "make_demo"]
