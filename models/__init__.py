"""Classifiers that a user brings: reading their checkpoint files safely.

The project's own classifiers are in `model.py`, which is the door.
"""
