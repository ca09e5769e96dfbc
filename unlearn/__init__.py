"""From a request to forget to an edited classifier: masks, features, the graph network's objectives, our own methods.

`registry` says what a method is; `methods` holds our own and the controls, and `rivals` those of others. What judges an
edit, draws or writes records does not enter.
"""
