"""Processes that train together, engines for many tasks, and what an interrupted training goes on from.

Only this room knows torch.distributed. The loops themselves are in `trainer.py`.
"""
