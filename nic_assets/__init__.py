"""Neural image compression as Dagster data assets.

Declarations (assets, checks, partitions, resources, jobs, sensors), and what runs and looks after
them: staleness, tracking, executors, ``nic doctor``. The work itself is in ``nic_core``, which
knows nothing of this package.
"""

import warnings

from dagster_shared.utils.warnings import BetaWarning, PreviewWarning

# backfill policies and partitioned checks are marked so in this Dagster; it is pinned
warnings.filterwarnings("ignore", category=BetaWarning)
warnings.filterwarnings("ignore", category=PreviewWarning)
