"""Load, check, apply, lift, compose and seal masks: what a server needs of MIMU, with torch and safetensors alone.

This room is a package of its own (`pip install .` brings it and nothing else), so it imports nothing of the project
around it, and names here what its users call.
"""

from mimu.applying import Standing, status
from mimu.composing import compose
from mimu.config import Config, Parent, Target
from mimu.errors import MaskError, ParentWarning
from mimu.mask import Mask, from_prune
from mimu.parent import Fit, describe_parent, state_sha256
from mimu.sealing import Sealed, restore, seal

__all__ = [
    "Config",
    "Fit",
    "Mask",
    "MaskError",
    "Parent",
    "ParentWarning",
    "Sealed",
    "Standing",
    "Target",
    "compose",
    "describe_parent",
    "from_prune",
    "restore",
    "seal",
    "state_sha256",
    "status",
]
