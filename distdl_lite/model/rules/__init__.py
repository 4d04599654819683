"""The rules of operations that graphs alone need; those of layers live with their families in `distdl_lite.nn`."""

from distdl_lite.model.rules import attention as attention
from distdl_lite.model.rules import contractions as contractions
from distdl_lite.model.rules import creation as creation
from distdl_lite.model.rules import dims as dims
from distdl_lite.model.rules import elementwise as elementwise
from distdl_lite.model.rules import indexing as indexing
from distdl_lite.model.rules import recurrent as recurrent
from distdl_lite.model.rules import reductions as reductions
from distdl_lite.model.rules import windows as windows
