"""What a run, a sweep or a library of masks would take, said beforehand: seconds, memory and disk of every stage.

`extent` counts what a configuration asks for, `units` measures on this machine what one piece of each kind costs, and
`forecast` multiplies; `library` does all three for masks of a user's model. Nothing here writes below the output
folder; `commands` is the door.
"""
