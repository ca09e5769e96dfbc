"""Judge models: metrics, attacks, probes, intervals, exhibits, integrity, verdicts; kappa per request.

Every metric enters with the room: the modules that register metrics are listed here and nowhere else. What trains,
draws or writes files does not enter.
"""

# In this order metrics are shown: sorted by name, the imports would move columns of every table.
from measure import metrics, probes, comparisons  # isort: skip

__all__ = ["comparisons", "metrics", "probes"]
