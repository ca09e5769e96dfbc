"""Records -> choice of points, tables, figures and the HTML page.

`reporter` is the door. Everything here is made from the JSON records alone: the room needs core, and no torch, dataset
or network.
"""
