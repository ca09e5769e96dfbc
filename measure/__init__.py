"""What models are judged by: metrics, attacks, probes, intervals, exhibits, integrity, verdicts; kappa per request.

Every metric enters with the room: the modules that register metrics are listed here and nowhere else. What trains,
draws or writes files does not enter.
"""

from measure import comparisons, metrics, probes

__all__ = ["comparisons", "metrics", "probes"]
