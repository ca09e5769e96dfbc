"""Classifiers that a user brings: files and specs -> a module with its classes, preprocessing and names on disk.

What enters is read and never run, but for the file that a `py:` spec names. Nothing here knows the pipeline, a
method or a metric. The project's own classifiers are in `model.py`, which is the door.
"""
