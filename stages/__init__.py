"""What a run is made from, each stage kept under the hash of all its inputs, and what is checked before anything runs.

`pipeline` is the door and the only file that enters.
"""
