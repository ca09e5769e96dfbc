"""What is shown beside the report: a run's table on the terminal and the leaderboard of many runs (records alone, no
torch), and the demo that answers live.

The demo measures with the run's own stages and `Eval`; nothing here measures by itself, and nothing here is asked by
other rooms than `commands`.
"""
