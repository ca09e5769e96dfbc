"""Other people's methods, written from what their papers say, and the list of all methods that are compared.

`unlearn.registry` says what a method is, `unlearn.methods` holds our own; `compared` lists the files that register, in
the order of the tables. What judges an edit, draws or writes records does not enter.
"""
