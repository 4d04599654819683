"""The MPI transport: native collectives, persistent packed messages. The only folder that imports mpi4py.

The library works on its own duplicate of each communicator it is given, so a user's traffic cannot match its messages.
There is one communicator per team of ranks, cached under that duplicate and never owned by a layer: MPICH has about 2,000
context ids, and models have thousands of layers.
"""

from distdl_lite.transport.mpi.buffers import MPI
from distdl_lite.transport.mpi.transport import MPITransport, transport_over

__all__ = ["MPI", "MPITransport", "transport_over"]
