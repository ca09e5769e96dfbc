"""The graph of weights: which weights are nodes, which of them are neighbours, and message passing in closed form.

A graph is a layout (shapes, degrees); its edges are never built except by the oracle that tests compare with. The
network over the graph, `MaskingGCN`, is in `model.py`.
"""
