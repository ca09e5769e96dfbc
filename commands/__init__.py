"""The commands of `main.py`: a command is a function whose typed parameters are its flags.

A command may use everything but `stages`, which `Pipeline` is for; nothing but `main.py` imports a command. To add one,
write its function here and name it in the table of `main.py`. What a command needs of torch, numpy and the like is
imported inside the function, so that help pages need none of it; `command_line` says what a parameter can be.
"""
