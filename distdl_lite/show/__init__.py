"""Pictures of partitions, halos, messages, networks' cuts and reports, by matplotlib: ``dl.show.partition((2, 2), (7, 5))``.

They need no ranks. Each draws into the Axes given or a new figure, and returns it. A rank has the same colour in all of them.
"""

from distdl_lite.show.blocks import halos, partition
from distdl_lite.show.drawing import colour
from distdl_lite.show.plans import messages
from distdl_lite.show.reports import cuts, layers, scaling
