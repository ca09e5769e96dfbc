"""What a model still tells of forgotten classes beside its answers: metrics of held-back logits, features and heads.

The metrics enter with the room, after those of `measure`: the modules that register them are listed here. `words` says
by a rule whether features tell as much as after retraining. What trains for a request, draws or writes does not enter.
"""

# In this order metrics are shown: sorted by name, the imports would move columns of every table.
from hidden import outputs, layers, critics, retraining, heads, positions, normalisation  # isort: skip

__all__ = ["critics", "heads", "layers", "normalisation", "outputs", "positions", "retraining"]
