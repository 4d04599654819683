"""The name under which `levels_of` is documented."""

from distdl_lite.optim.nodes import levels_of as levels_of
