"""Experiments that compare encoders and models; each module is one, with its own commands.

An experiment is run by hand, takes up to hours and can be interrupted: what is finished is kept in
its folder. Its results are tables and pictures under ``docs/``. Nothing in ``nic_core`` imports
this package.
"""
