"""Who started this process, read from its environment alone: Slurm, Open MPI, Kubernetes Indexed Jobs and JobSets, Kubeflow's jobs, torchrun, or a person.

JAX's own detection is not used: it gives each process one GPU under Slurm and Open MPI even where a node runs one process (seven of eight stay idle without
a word), knows neither Open MPI 5 nor Kubeflow, and asks the Kubernetes API for rights to list pods. Given up: clusters that only their own software can ask.
"""

import dataclasses
import re
from collections.abc import Mapping

from neva_jax.errors import UserError

PORT = 6666  # where a host comes without one; Kubeflow's JAXJob has the same
TORCH = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
JAXJOB = ("COORDINATOR_ADDRESS", "COORDINATOR_PORT", "NUM_PROCESSES", "PROCESS_ID")
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """launcher: in words; coordinator: host:port of process 0; local_device_ids: which of the node's devices are this process' own, None: all of them."""

    launcher: str
    coordinator: str | None
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def detect(environ: Mapping[str, str]) -> ClusterSpec | None:
    """This process' place among others, or None where nothing says that there are others. A cluster of one process is one: its coordinator may be None.

    What names ranks itself (JAX_*, JAXJob, PyTorchJob and torchrun) comes before what only started the process (Open MPI, Slurm, Kubernetes), since the inner
    launcher knows best. Raises UserError where variables are half set or contradict each other.
    """
    named = [spec for find in (_explicit, _jaxjob, _torch) if (spec := find(environ))]
    for spec in named[1:]:
        if (spec.num_processes, spec.process_id) != (named[0].num_processes, named[0].process_id):
            raise UserError(
                f"{named[0].launcher} says process {named[0].process_id} of {named[0].num_processes}, and {spec.launcher} process {spec.process_id} of "
                f"{spec.num_processes}; unset the one that is not meant"
            )
    found = named[0] if named else next((spec for find in (_open_mpi, _slurm, _kubernetes) if (spec := find(environ))), None)
    if found is None:
        _refuse_leftovers(environ)
        return None
    if not 0 <= found.process_id < found.num_processes:
        raise UserError(f"{found.launcher} says process {found.process_id} of {found.num_processes}; they are numbered from 0 to {found.num_processes - 1}")
    _compare_sizes(environ, found)
    return dataclasses.replace(found, coordinator=_coordinator(environ, found), local_device_ids=_given_devices(environ, found.local_device_ids))


# ---- what names ranks itself -------------------------------------------------------------------------------------------------------------------------


def _explicit(environ) -> ClusterSpec | None:
    if "JAX_PROCESS_ID" not in environ:
        return None  # the others complete what a launcher knows
    _complete(environ, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    return ClusterSpec("JAX_NUM_PROCESSES and JAX_PROCESS_ID", None, _number(environ, "JAX_NUM_PROCESSES"), _number(environ, "JAX_PROCESS_ID"))


def _jaxjob(environ) -> ClusterSpec | None:
    if not any(name in environ for name in JAXJOB):
        return None
    _complete(environ, JAXJOB)
    address = f"{environ['COORDINATOR_ADDRESS']}:{_number(environ, 'COORDINATOR_PORT')}"
    return ClusterSpec("Kubeflow's JAXJob (NUM_PROCESSES, PROCESS_ID)", address, _number(environ, "NUM_PROCESSES"), _number(environ, "PROCESS_ID"))


def _torch(environ) -> ClusterSpec | None:
    """PyTorchJob starts one process a pod, torchrun one a GPU. PyTorchJob's WORLD_SIZE counts what torchrun would start, PET_NNODES the pods."""
    if "LOCAL_RANK" in environ and "RANK" in environ:
        _complete(environ, (*TORCH, "LOCAL_WORLD_SIZE"))
        agent_listens = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # on MASTER_PORT, for as long as its workers run
        address = f"{environ['MASTER_ADDR']}:{_number(environ, 'MASTER_PORT') + agent_listens}"
        mine = _share(environ, _number(environ, "LOCAL_RANK"), _number(environ, "LOCAL_WORLD_SIZE"))
        return ClusterSpec("torchrun (WORLD_SIZE, RANK)", address, _number(environ, "WORLD_SIZE"), _number(environ, "RANK"), mine)
    if environ.get("PET_NNODES", "").isdecimal() and "PET_NODE_RANK" in environ:
        rank = _number(environ, "PET_NODE_RANK")
        if "RANK" in environ and _number(environ, "RANK") != rank:
            raise UserError(f"RANK is {environ['RANK']} and PET_NODE_RANK is {rank}; both number the nodes, unset the one that is not meant")
        address = environ.get("PET_MASTER_ADDR") or environ.get("MASTER_ADDR")
        port = environ.get("PET_MASTER_PORT") or environ.get("MASTER_PORT") or PORT
        return ClusterSpec("Kubeflow (PET_NNODES, PET_NODE_RANK)", address and f"{address}:{port}", _number(environ, "PET_NNODES"), rank)
    if "RANK" not in environ:
        return None
    if environ.get("WORLD_SIZE") != "1":
        _complete(environ, TORCH)
    address = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}" if "MASTER_ADDR" in environ else None
    return ClusterSpec("PyTorchJob (WORLD_SIZE, RANK)", address, _number(environ, "WORLD_SIZE"), _number(environ, "RANK"))


# ---- what started the process ------------------------------------------------------------------------------------------------------------------------


def _open_mpi(environ) -> ClusterSpec | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ and "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    names = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))
    _complete(environ, names)
    size, rank, local_rank, local_size = (_number(environ, name) for name in names)
    launcher = re.search(r"tcp://([^,:]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))  # Open MPI 5 has it no more
    host = "127.0.0.1" if local_size == size else launcher and launcher[1]
    address = host and f"{host}:{_port(environ.get('PMIX_NAMESPACE') or environ.get('OMPI_MCA_ess_base_jobid', '0'))}"
    return ClusterSpec("Open MPI", address, size, rank, _share(environ, local_rank, local_size))


def _slurm(environ) -> ClusterSpec | None:
    """Only under srun: an sbatch script itself is one process, whatever its job asks for."""
    if "SLURM_STEP_NODELIST" not in environ:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    _complete(environ, ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", size))
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environ["SLURM_STEP_NODELIST"])[0]
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)  # gpu[07-12,20] -> gpu07
    address = f"{host}:{_port(environ['SLURM_JOB_ID'], environ.get('SLURM_STEP_ID', '0'))}"
    bound = any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))  # each task then sees its own GPUs alone
    mine = None if bound else _share(environ, _number(environ, "SLURM_LOCALID"), _tasks_here(environ))
    return ClusterSpec("Slurm", address, _number(environ, size), _number(environ, "SLURM_PROCID"), mine)


def _tasks_here(environ) -> int:
    """Tasks of the step on this node: SLURM_STEP_TASKS_PER_NODE is 4(x2),3 for three nodes with 4, 4 and 3."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or environ.get("SLURM_NTASKS_PER_NODE", "")
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, expected such as 8(x2); start the program with srun --ntasks-per-node=N")
    counts = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    return counts[min(_number(environ, "SLURM_NODEID"), len(counts) - 1)] if "SLURM_NODEID" in environ else counts[0]


def _kubernetes(environ) -> ClusterSpec | None:
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    if "JAX_NUM_PROCESSES" not in environ:
        raise UserError(
            f"JOB_COMPLETION_INDEX is {environ['JOB_COMPLETION_INDEX']}: a pod of a Kubernetes Indexed Job, which does not know how many they are; set "
            "JAX_NUM_PROCESSES (the Job's parallelism, 1 if this pod trains alone) and JAX_COORDINATOR_ADDRESS in its manifest, as launch/jobset.yaml does"
        )
    index, size = _number(environ, "JOB_COMPLETION_INDEX"), _number(environ, "JAX_NUM_PROCESSES")
    return ClusterSpec("Kubernetes Indexed Job (JOB_COMPLETION_INDEX, JAX_NUM_PROCESSES)", None, size, index)


# ---- parts -------------------------------------------------------------------------------------------------------------------------------------------


def _coordinator(environ, found: ClusterSpec) -> str | None:
    """host:port of process 0: JAX_COORDINATOR_ADDRESS before all, JAX_COORDINATOR_PORT for its port, MASTER_ADDR for a launcher that does not know."""
    address = environ.get("JAX_COORDINATOR_ADDRESS") or found.coordinator
    if not address and "MASTER_ADDR" in environ:
        address = f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', PORT)}"
    if not address:
        if found.num_processes == 1:
            return None
        raise UserError(f"{found.launcher} counts {found.num_processes} processes, but does not say where process 0 is; set JAX_COORDINATOR_ADDRESS=HOST:PORT")
    host, port = match.groups() if (match := re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]+)(?::(\d{1,5}))?", address)) else ("", "")
    port = environ.get("JAX_COORDINATOR_PORT") or port or str(PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"the coordinator's address is {address!r}, with the port {port!r}; expected HOST:PORT, and set JAX_COORDINATOR_ADDRESS to such")
    return f"{host}:{port}"


def _given_devices(environ, ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
    given = environ.get("JAX_LOCAL_DEVICE_IDS")
    if given and not re.fullmatch(r"\d+(,\d+)*", given):
        raise UserError(f"JAX_LOCAL_DEVICE_IDS is {given!r}, expected numbers of devices such as 0,1; unset it for those that the launcher gives")
    return tuple(map(int, given.split(","))) if given else ids


def _share(environ, local_rank: int, local_size: int) -> tuple[int, ...] | None:
    """Which of the node's devices belong to its process local_rank of local_size. A process that is alone, or sees only one, has all that it sees."""
    if not local_rank < local_size:
        raise UserError(f"this is process {local_rank} of {local_size} on its node (counted from 0); the launcher's variables contradict each other")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    listed = len([name for name in visible.split(",") if name]) if visible is not None else None
    count = listed if listed is not None else int(environ.get("SLURM_GPUS_ON_NODE") or local_size)
    if local_size == 1 or count <= 1:
        return None
    if count % local_size:
        raise UserError(f"{local_size} processes share this node's {count} GPUs, which cannot be divided; start one process a node, or one a GPU")
    each = count // local_size
    return tuple(range(local_rank * each, (local_rank + 1) * each))


def _port(*numbers: str) -> int:
    """A port that all processes of a job compute alike and that other jobs of the node hardly have; above the range Linux gives out by itself."""
    return 61440 + sum(int(re.sub(r"\D", "", number) or 0) for number in numbers) % 4096


def _number(environ, name: str) -> int:
    if not environ[name].strip().isdecimal():
        raise UserError(f"{name} is {environ[name]!r}, expected a whole number of 0 or more; correct it, or unset it and its companions to train alone")
    return int(environ[name])


def _complete(environ, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in environ]:
        found = ", ".join(f"{name}={environ[name]}" for name in names if name in environ)
        raise UserError(f"{', '.join(missing)} is not set, beside {found or 'what the launcher sets'}; set all of {', '.join(names)}, or none to train alone")


def _compare_sizes(environ, found: ClusterSpec) -> None:
    """What scripts export beside a launcher must say what it says. (torchrun under another launcher counts otherwise, and is the inner one.)"""
    counted = {"JAX_NUM_PROCESSES"} | ({"WORLD_SIZE"} if "RANK" not in environ else set())
    for name in sorted(counted & environ.keys()):
        if _number(environ, name) != found.num_processes:
            raise UserError(f"{name} is {environ[name]}, and {found.launcher} started {found.num_processes} processes; set {name} to that, or unset it")


def _refuse_leftovers(environ) -> None:
    """Some of a set without the others, and no launcher that would know them: the other processes may be waiting."""
    for names in (EXPLICIT, TORCH):
        if any(name in environ for name in names):
            _complete(environ, names)
