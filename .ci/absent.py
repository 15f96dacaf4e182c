"""Fail where one of the named modules can be imported: ``python .ci/absent.py dagster mlflow``."""

from __future__ import annotations

import importlib.util
import sys

found = [module for module in sys.argv[1:] if importlib.util.find_spec(module) is not None]
if found:
    sys.exit(f"installed, and should not be: {', '.join(found)}")
