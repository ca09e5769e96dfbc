"""Erasing a class from the features, too: a mask over many layers, so that what they tell is what retraining leaves.

`stages` says which layers take part and what features are, `terms` how well features tell a class from those that it
is to be taken for, `proxies` how well they may, `descent` finds the mask, `head` the forgotten classes' rows of the
last layer, and `erasure` does all of it for one request.
"""
