"""The name under which `Bucket` is documented."""

from distdl_lite.parallel.replicas.bucket import Bucket as Bucket
