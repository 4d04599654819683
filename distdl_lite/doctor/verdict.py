"""What the findings of all ranks say: lines to print, variables to set, and whether something is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from distdl_lite.bench.table import Row
from distdl_lite.doctor.watch import Failure

DIRECT = "device memory in MPI's messages", "device memory in MPI's sums"
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPICH's mpirun", "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_ALONE = (
    "one rank alone: start `mpirun -n 2 python -m distdl_lite doctor`, "
    "or `torchrun --nproc-per-node 2 -m distdl_lite doctor`"
)
_BIND = "mpirun --bind-to core (Open MPI), mpirun -bind-to core (MPICH), srun --cpu-bind=cores"
_FAST = 3e9  # bytes a second that a fast network brings at least

Facts = Mapping[str, Any]  # of one rank
Findings = Mapping[str, Sequence[Any]]  # of each step, one of each rank


class Launched(NamedTuple):
    """What started this process, as the environment tells."""

    by: str | None
    rank: int
    size: int


def launched(environ: Mapping[str, str]) -> Launched:
    """The launcher, the rank, and of how many; one rank where nothing tells.

    >>> launched({"PMI_RANK": "1", "PMI_SIZE": "4"})
    Launched(by="MPICH's mpirun", rank=1, size=4)
    """
    known = ((by, environ[r], environ[n]) for by, r, n in _LAUNCHERS if r in environ and n in environ)
    by, rank, size = next(known, (None, 0, 1))
    return Launched(by, int(rank), int(size))


@dataclass
class Verdict:
    """What is wrong, what is good to know, and the variables to set."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    def to_dict(self, found: Findings) -> dict[str, Any]:
        """All of it, with what it follows from."""
        return {"ok": not self.wrong, **asdict(self), "findings": found}

    def __str__(self) -> str:
        lines = [*(f"WRONG: {line}" for line in self.wrong), *self.notes]
        exports = [f"export {name}={value}" for name, value in self.variables.items()]
        return "\n".join(["not well" if self.wrong else "all is well", *lines, *exports])


def judge(found: Findings, failure: Failure | None, launcher: Launched, environ: Mapping[str, str]) -> Verdict:
    """The verdict on the findings, and on how the process ended that made them, if not as it should."""
    made = Verdict()
    for name, ranks in found.items():
        texts = {rank: text for rank, text in enumerate(ranks) if isinstance(text, str) and text}
        if texts and name not in DIRECT:
            rank, text = next(iter(texts.items()))
            made.wrong.append(f"{name}: {text} (rank {rank}; on {len(texts)} ranks of {len(ranks)})")
    if failure is not None and not failure.risky:
        made.wrong.append(str(failure))
    facts = found.get("facts")
    if "start" in found:
        made.notes.append("MPI comes with `pip install mpich`, or is the cluster's: MPI4PY_LIBMPI names its library")
    if not facts:
        if launcher.by not in (None, "torchrun"):
            made.notes.append(f"{launcher.by} started this: the MPI library must be the one that it belongs to")
        return made
    _judge_ranks(made, facts, launcher)
    for host in dict.fromkeys(one["host"] for one in facts):
        _judge_cores(made, host, [one for one in facts if one["host"] == host], environ)
    _judge_devices(made, found, failure, environ)
    _judge_network(made, found, environ)
    return made


def _judge_ranks(made: Verdict, facts: Sequence[Facts], launcher: Launched) -> None:
    library = facts[0]["library"]
    if launcher.size != len(facts):
        made.wrong.append(
            f"{launcher.by} started {launcher.size} ranks, and {library['transport']} knows {len(facts)}: they do not "
            "belong together; use the mpirun of the MPI library that is loaded"
        )
    elif len(facts) == 1:
        made.notes.append(f"{_ALONE}; mpirun is {facts[0]['mpirun'] or 'not on PATH'}")
    for name in facts[0]["versions"] | library:
        there = sorted({str((one["versions"] | one["library"]).get(name)) for one in facts})
        if len(there) > 1:
            made.wrong.append(f"ranks differ in {name}: {', '.join(there)}")
    level = library.get("thread level", "MULTIPLE")
    way = f"{library['transport']} carries all tensors"
    made.notes.append(way if level == "MULTIPLE" else f"{way}, sums not beside the backward: its threads are {level}")


def _judge_cores(made: Verdict, host: str, ranks: Sequence[Facts], environ: Mapping[str, str]) -> None:
    """The threads of one host's ranks against the cores there are."""
    bound = {core for one in ranks for core in one["cores"]}
    cores = max(1, int(min(len(bound), ranks[0]["quota"] or len(bound))))
    threads = sum(one["threads"] for one in ranks)
    share = max(1, min(cores // len(ranks), *(len(one["cores"]) for one in ranks)))
    narrow = next((one for one in ranks if one["threads"] > len(one["cores"])), None)
    fewer = f": start at most {cores}" if len(ranks) > cores else ""
    if len(bound) < min(len(ranks), ranks[0]["host_cores"]):
        made.wrong.append(f"{host}: {len(ranks)} ranks are bound to the same cores {sorted(bound)}: {_BIND}")
    elif threads > cores:
        made.wrong.append(
            f"{host}: {len(ranks)} ranks with {threads} threads share {cores} cores, and all are slow{fewer}"
        )
    elif narrow is not None:
        made.wrong.append(f"{host}: a rank with {narrow['threads']} threads is bound to cores {narrow['cores']}")
    elif 2 * threads <= cores:
        made.notes.append(f"{host}: of {cores} cores {threads} are used")
    is_other = any(one["threads"] != share for one in ranks) and environ.get("OMP_NUM_THREADS") != str(share)
    if (threads > cores or narrow or 2 * threads <= cores) and is_other:
        made.variables["OMP_NUM_THREADS"] = str(min(share, int(made.variables.get("OMP_NUM_THREADS", share))))


def _judge_devices(made: Verdict, found: Findings, failure: Failure | None, environ: Mapping[str, str]) -> None:
    """The way that tensors of devices take."""
    facts, library = found["facts"], found["facts"][0]["library"]
    if not all(one["gpus"] for one in facts):
        made.notes += ["some ranks have no CUDA device"] * any(one["gpus"] for one in facts)
        return
    for host, ranks in Counter(one["host"] for one in facts).items():
        gpus = next(one["gpus"] for one in facts if one["host"] == host)
        if ranks > gpus:
            made.notes.append(f"{host}: {ranks} ranks share {gpus} CUDA devices, which NCCL refuses")
    if library["transport"] != "MPI":
        return
    answers = [text for name in DIRECT for text in found.get(name, ["MPI's library says that it takes none"])]
    why = str(failure) if failure is not None and failure.risky else next(filter(None, answers), "")
    made.notes.append(f"MPI gets device tensors through host memory: {why}" if why else "MPI gets device tensors")
    if environ.get("DISTDL_LITE_MPI_CUDA", "staged") != (way := "staged" if why else "direct"):
        made.variables["DISTDL_LITE_MPI_CUDA"] = way
    if why and "CRAY" in library["MPI library"] and environ.get("MPICH_GPU_SUPPORT_ENABLED") != "1":
        made.variables["MPICH_GPU_SUPPORT_ENABLED"] = "1"


def _judge_network(made: Verdict, found: Findings, environ: Mapping[str, str]) -> None:
    """The network that joins the hosts."""
    here = found["facts"][0]
    across = next((v for kind, v in _speeds(found) if kind.endswith("across hosts")), None)
    if across is None or across["bandwidth"] >= _FAST:
        return
    if here["infiniband"]:
        made.notes.append(f"the hosts' fast network, {', '.join(here['infiniband'])}, seems not to be used")
    elif len(here["interfaces"]) > 1:
        made.notes.append(f"if another network of {', '.join(here['interfaces'])} is faster, name that one instead")
    made.variables |= {k: v for k, v in _network(here).items() if v and k not in environ}


def _network(here: Facts) -> dict[str, str]:
    """The variables by which the library takes the fast network, or else that of the default route."""
    library, ports, interface = here["library"], here["infiniband"], "" if here["infiniband"] else here["route"]
    if library["transport"] != "MPI":
        hca = ports[0] if ports else ""
        return {"NCCL_IB_HCA": hca, "NCCL_SOCKET_IFNAME": here["route"], "GLOO_SOCKET_IFNAME": here["route"]}
    if "Open MPI" in library["MPI library"]:
        return {"UCX_NET_DEVICES": f"{ports[0]}:1" if ports else interface, "OMPI_MCA_btl_tcp_if_include": interface}
    return {"FI_PROVIDER": "verbs" if ports else "tcp", "FI_TCP_IFACE": interface}


def _speeds(found: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was measured, by device and by kind of neighbour."""
    for name, ranks in found.items():
        if name.endswith("speed") and isinstance(ranks[0], dict):
            yield from ((f"{name}, {kind}", measured) for kind, measured in ranks[0].items())


def machine_rows(found: Findings) -> list[Row]:
    """Latencies and bandwidths for `Machine.read`, to which the last count: of devices, and across hosts."""
    rows = []
    for kind, measured in _speeds(found):
        rows.append(Row("latency", "", kind, 1e6 * measured["latency"]))
        rows.append(Row("bandwidth", "", kind, 1e-9 * measured["bandwidth"], unit="GB/s"))
    return rows


def lines_of(name: str, ranks: Sequence[Any]) -> list[str]:
    """The lines to print for what a step has found."""
    speeds = [
        (kind, f"{1e6 * v['latency']:.3g} us, {1e-9 * v['bandwidth']:.3g} GB/s") for kind, v in _speeds({name: ranks})
    ]
    pairs = _about(ranks) if name == "facts" else speeds
    pairs = pairs or [(name, next(filter(None, ranks), "right"))]
    return [f"{title + ':':25} {value}" for title, value in pairs]


def _about(facts: Sequence[Facts]) -> list[tuple[str, str]]:
    first, hosts = facts[0], Counter(one["host"] for one in facts)
    is_bound = len(first["cores"]) < first["host_cores"]
    return [
        *(first["versions"] | first["library"]).items(),
        ("ranks", ", ".join(f"{number} on {host}" for host, number in hosts.items())),
        (
            "cores",
            f"{len(first['cores'])} of {first['host_cores']} on rank 0{', bound' if is_bound else ', not bound'}",
        ),
        ("threads", f"{first['threads']} a rank"),
        ("devices", f"{first['gpus']} CUDA devices" if first["gpus"] else "no CUDA device"),
    ]
