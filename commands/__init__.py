"""What `main.py` offers beside its own flags: one function for each command.

A command may use everything; nothing but `main.py` imports a command.
"""
