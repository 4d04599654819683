"""DistDL's names: programs written for DistDL 0.5 run on this library.

``import distdl_lite.compat.distdl as distdl`` in place of ``import distdl``, or the program as it is by ``python -m
distdl_lite.compat.distdl program.py``, or `install` at its top. What differs stands in the manual, under *From DistDL*.
"""

import sys

from distdl_lite.compat.distdl.names import fill, install

__version__ = "0.5.0"  # of the DistDL whose names these are

fill(sys.modules[__name__])
