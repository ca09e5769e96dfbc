"""From a request to forget to an edited classifier: masks, features, the graph network's objectives, and all methods.

`registry` says what a method is; `methods` holds our own and the controls, and lists the modules whose methods are
compared. What judges an edit, draws or writes records does not enter.
"""
