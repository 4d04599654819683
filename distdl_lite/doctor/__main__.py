"""The child of one rank's process: ``python -m distdl_lite.doctor PIPE STACK LIMIT``."""

import sys

from distdl_lite.doctor.examine import child
from distdl_lite.doctor.watch import Voice

if __name__ == "__main__":
    pipe, stack, limit = sys.argv[1:]
    child(Voice(int(pipe), int(stack), float(limit)))
