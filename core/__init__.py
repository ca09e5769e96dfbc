"""What every other file may use: choices, errors, configuration, files on disk, hashes, records, intervals, messages.

Nothing here knows an image, a network or a method, and nothing here imports torch. `artifacts` alone opens result files
for writing.
"""
