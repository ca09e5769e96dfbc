"""Make the fork server, which loads this file first, and every worker that it forks end with their parent process.

A module of its own, because loading it is all that multiprocessing lets us do there, and because the libraries that
come next take seconds, in which a launcher that is killed would leave it alone.
"""

import os

from training.processes import tell_kernel

tell_kernel()
os.register_at_fork(after_in_child=tell_kernel)
