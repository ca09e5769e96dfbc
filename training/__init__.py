"""Processes that train together, and what an interrupted training goes on from.

Only this room knows torch.distributed. The loops themselves are in `trainer.py`.
"""
