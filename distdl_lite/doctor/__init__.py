"""`python -m distdl_lite doctor`: whether a job's ranks, cores, messages and devices work, how fast, and what to set.

The process of each rank starts a child, which makes the checks: a crash, or a wait without end, is an answer too. MPI can be
begun once in a rank, so that all checks run in the one child, those that may crash it last.
"""

from distdl_lite.doctor.examine import doctor

__all__ = ["doctor"]
