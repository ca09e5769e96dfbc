"""Forget classes of a classifier that a user already has: from his images and his model to a mask.

`answers.forget` is the whole of it in Python; `opening` does the same from files. It works on `models.foreign`, and
knows nothing of runs, records and figures.
"""
