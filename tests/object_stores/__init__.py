"""Tests of slides and stores in object stores, against servers on this machine."""
