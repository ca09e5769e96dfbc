"""The tests: a folder for each room; beside this file those of the nine scripts and of the tree as a whole."""
