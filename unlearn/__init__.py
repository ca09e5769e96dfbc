"""From a request to forget to an edited classifier: masks, features, our own methods, controls and rivals.

`methods` lists the modules whose methods are compared; `registry` says what a method is. What judges an edit, draws or
writes records does not enter.
"""
