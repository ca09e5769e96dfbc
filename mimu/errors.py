"""What this package raises and warns with."""


class MaskError(ValueError):
    """Say in one sentence what was found, what is needed, and what to do."""


class ParentWarning(UserWarning):
    """Say that a mask was applied to a model that is not, to the bit, the one that the mask was made for."""
