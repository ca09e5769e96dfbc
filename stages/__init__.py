"""What a run is made from, each stage kept under the hash of all its inputs, and what is checked before anything runs.

`chain` joins `classifier`, `graphs` and `gcn`; `evaluation` measures what they made. A stage's key hashes the files
that its module imports, so nothing that draws or writes reports may enter. `pipeline` and the commands are the doors.
"""
