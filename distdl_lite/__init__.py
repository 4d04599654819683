"""PyTorch models cut over ranks, by MPI or torch.distributed: every data movement a linear operator with its exact adjoint."""

from distdl_lite import data, nn, show, tagi, testing
from distdl_lite.checkpoint.files import Checkpoint, latest_checkpoint, read_checkpoint
from distdl_lite.checkpoint.load import Loaded, load
from distdl_lite.checkpoint.save import save
from distdl_lite.checkpoint.writing import Saving
from distdl_lite.heat.daso import DASO
from distdl_lite.heat.deferred import DataParallelOptimizer
from distdl_lite.heat.multi_gpu import DataParallelMultiGPU
from distdl_lite.layout import Layout
from distdl_lite.model.distributed import distribute
from distdl_lite.model.gradient_norm import check_optimizer, clip_grad_norm_, grad_norm
from distdl_lite.model.optimizer_state import load_serial_optimizer_state_dict, serial_optimizer_state_dict
from distdl_lite.model.prove import Proof, prove
from distdl_lite.model.replicas import check_replicas, synchronise_replicas
from distdl_lite.model.report import Machine, Report, report
from distdl_lite.model.suggest import suggest
from distdl_lite.model.summary import summary
from distdl_lite.model.weights import load_serial_state_dict, serial_state_dict
from distdl_lite.nn.inputs import zero_volume_tensor
from distdl_lite.nn.norm.sync_batch_norm import SyncBatchNorm
from distdl_lite.nn.scatter_gather import gather, scatter
from distdl_lite.operator import Operator
from distdl_lite.optim.local_sgd import LocalSGD
from distdl_lite.optim.schedule import DASOSchedule, Periodic, PostLocal
from distdl_lite.parallel.process_group import MPIProcessGroup
from distdl_lite.parallel.replicas.data_parallel import DataParallel
from distdl_lite.parallel.root.root_data_parallel import RootDataParallel
from distdl_lite.partition import CartesianPartition, Partition
from distdl_lite.plan import Plan, plan
from distdl_lite.testing import count
from distdl_lite.timeline.trace import trace
from distdl_lite.transport.abort import abort_on_exception
from distdl_lite.transport.waiting import abort_on_timeout

__version__ = "0.1.0"
