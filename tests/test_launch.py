"""What launchers put into the environment, and which place among others `detect` reads from it: by hand-written environments, and by those that the files of
launch/ lead to (each file is parsed, and its launcher's part played as its documentation has it)."""

import re
import shlex

import pytest
import yaml
from helpers import ROOT

from neva_jax import cli
from neva_jax.errors import UserError
from neva_jax.parallel.launchers import ClusterSpec, detect

LAUNCH = ROOT / "launch"
SLURM = {
    "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip
PER_GPU = {
    **SLURM, "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "11", "SLURM_LOCALID": "3",
}  # fmt: skip
TORCH = {"MASTER_ADDR": "neva-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "2"}
TORCHRUN = {**TORCH, "WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "JAX_COORDINATOR_ADDRESS": "node1:7000",
}  # fmt: skip
JAXJOB = {"COORDINATOR_ADDRESS": "neva-worker-0", "COORDINATOR_PORT": "6666", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
INDEXED = {"JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "4", "JAX_COORDINATOR_ADDRESS": "neva-0.neva:1234"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}

PLACES = {  # name: (environment, coordinator, processes, this one, its devices of the node)
    "Slurm, a task a node: all GPUs": (SLURM, f"gpu07:{61440 + 4245 % 4096}", 2, 1, None),
    "Slurm, a task a GPU": (PER_GPU, f"gpu07:{61440 + 4245 % 4096}", 16, 11, (3,)),
    "Slurm, four GPUs a task": (
        {**PER_GPU, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
        f"gpu07:{61440 + 4245 % 4096}", 4, 3, (4, 5, 6, 7),
    ),
    "Slurm, GPUs bound to tasks": ({**PER_GPU, "SLURM_GPUS_PER_TASK": "1"}, f"gpu07:{61440 + 4245 % 4096}", 16, 11, None),
    "Slurm, one GPU visible": ({**PER_GPU, "CUDA_VISIBLE_DEVICES": "5"}, f"gpu07:{61440 + 4245 % 4096}", 16, 11, None),
    "Slurm, uneven nodes": (
        {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_NODEID": "2"},
        f"gpu07:{61440 + 4245 % 4096}", 5, 4, None,
    ),
    "Slurm, the step and not the job counts": ({**SLURM, "SLURM_NTASKS": "64"}, f"gpu07:{61440 + 4245 % 4096}", 2, 1, None),
    "Slurm with the usual exports": ({**SLURM, "MASTER_ADDR": "x", "MASTER_PORT": "1", "WORLD_SIZE": "2"}, f"gpu07:{61440 + 4245 % 4096}", 2, 1, None),
    "Slurm, a port by hand": ({**SLURM, "JAX_COORDINATOR_PORT": "999"}, "gpu07:999", 2, 1, None),
    "PyTorchJob": (TORCH, "neva-master-0:23456", 4, 2, None),
    "PyTorchJob of one pod": ({"WORLD_SIZE": "1", "RANK": "0"}, None, 1, 0, None),
    "PyTorchJob that counts GPUs": (
        {**TORCH, "WORLD_SIZE": "32", "PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8"}, "neva-master-0:23456", 4, 2, None,
    ),
    "TrainJob": (
        {"PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "neva-node-0-0.neva", "PET_MASTER_PORT": "29500",
         "JOB_COMPLETION_INDEX": "2"}, "neva-node-0-0.neva:29500", 4, 2, None,
    ),
    "torchrun": (TORCHRUN, "neva-master-0:23456", 16, 11, (3,)),
    "torchrun, whose agent listens": ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, "neva-master-0:23457", 16, 11, (3,)),
    "torchrun inside Slurm": ({**SLURM, **TORCHRUN}, "neva-master-0:23456", 16, 11, (3,)),
    "Open MPI": (OPEN_MPI, "node1:7000", 4, 3, (1,)),
    "Open MPI inside Slurm": ({**SLURM, **OPEN_MPI}, "node1:7000", 4, 3, (4, 5, 6, 7)),
    "Open MPI 4, which says where it is": (
        {**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "PMIX_NAMESPACE": "4097"},
        "10.96.0.1:61441", 4, 3, (1,),
    ),
    "Open MPI on one node": (
        {**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "prterun-n-5@1"},
        "127.0.0.1:61491", 2, 1, (1,),
    ),
    "JAXJob": (JAXJOB, "neva-worker-0:6666", 4, 3, None),
    "Indexed Job": (INDEXED, "neva-0.neva:1234", 4, 2, None),
    "Indexed Job, no port": ({**INDEXED, "JAX_COORDINATOR_ADDRESS": "neva-0.neva"}, "neva-0.neva:6666", 4, 2, None),
    "by hand": (EXPLICIT, "10.0.0.1:1234", 2, 1, None),
    "by hand, IPv6, with devices": ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "[fe80::1]:1234", "JAX_LOCAL_DEVICE_IDS": "2,3"}, "[fe80::1]:1234", 2, 1, (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    environ, *expected = PLACES[name]
    spec = detect(environ)
    assert [spec.coordinator, spec.num_processes, spec.process_id, spec.local_device_ids] == expected


@pytest.mark.parametrize("environ", [
    {}, {"CUDA_VISIBLE_DEVICES": "0,1"}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {"JAX_LOCAL_DEVICE_IDS": "0"},
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # inside an sbatch script, without srun
])  # fmt: skip
def test_alone(environ):
    assert detect(environ) is None


REFUSED = {  # name: (environment, what the sentence must name)
    "no RANK": ({k: v for k, v in TORCH.items() if k != "RANK"}, "RANK WORLD_SIZE=4"),
    "no WORLD_SIZE": ({k: v for k, v in TORCH.items() if k != "WORLD_SIZE"}, "WORLD_SIZE RANK=2"),
    "no MASTER_ADDR": ({k: v for k, v in TORCH.items() if k != "MASTER_ADDR"}, "MASTER_ADDR"),
    "only MASTER_ADDR": ({"MASTER_ADDR": "x"}, "MASTER_PORT"),
    "a rank too high": ({**TORCH, "RANK": "4"}, "process 4 of 4"),
    "a rank in words": ({**TORCH, "RANK": "two"}, "RANK 'two'"),
    "a rank below 0": ({**TORCH, "RANK": "-1"}, "RANK '-1'"),
    "two ranks": ({**TORCH, "PET_NNODES": "4", "PET_NODE_RANK": "1"}, "RANK PET_NODE_RANK"),
    "a local rank too high": ({**TORCHRUN, "LOCAL_RANK": "8"}, "process 8 of 8 on its node"),
    "GPUs that cannot be shared": ({**TORCHRUN, "CUDA_VISIBLE_DEVICES": "0,1,2"}, "8 processes 3 GPUs"),
    "PyTorchJob against by hand": ({**TORCH, **EXPLICIT}, "JAX_PROCESS_ID RANK"),
    "no JAX_NUM_PROCESSES": ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "x:1"}, "JAX_NUM_PROCESSES JAX_PROCESS_ID=0"),
    "no JAX_PROCESS_ID": ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "x:1"}, "JAX_PROCESS_ID"),
    "no address": ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS"),
    "a strange address": ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "http://x:1"}, "'http://x:1' HOST:PORT"),
    "a strange port": ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "x:99999"}, "'99999'"),
    "strange devices": ({**EXPLICIT, "JAX_LOCAL_DEVICE_IDS": "all"}, "JAX_LOCAL_DEVICE_IDS 'all'"),
    "half a JAXJob": ({k: v for k, v in JAXJOB.items() if k != "NUM_PROCESSES"}, "NUM_PROCESSES PROCESS_ID=3"),
    "an Indexed Job alone": ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX JAX_NUM_PROCESSES launch/jobset.yaml"),
    "Open MPI 5 on two nodes": ({k: v for k, v in OPEN_MPI.items() if k != "JAX_COORDINATOR_ADDRESS"}, "JAX_COORDINATOR_ADDRESS"),
    "half of Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK"),
    "Slurm against WORLD_SIZE": ({**SLURM, "WORLD_SIZE": "16"}, "WORLD_SIZE 16 2 processes"),
    "Slurm without tasks": ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "?"}, "SLURM_STEP_TASKS_PER_NODE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    environ, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        detect(environ)
    assert all(word in str(error.value) for word in words.split()), error.value


@pytest.mark.parametrize(("nodes", "first"), [
    ("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],host2", "node001"), ("node[007,009-011]", "node007"),
    ("rack[1-2]node[03-04],x", "rack1node03"), ("a-[5]-b.example", "a-5-b.example"),
])  # fmt: skip
def test_the_first_host_of_slurms_list(nodes, first):
    assert detect({**SLURM, "SLURM_STEP_NODELIST": nodes}).coordinator.split(":")[0] == first


# ---- the files -----------------------------------------------------------------------------------------------------------------------------------------


def pod_environ(container, **fields) -> dict[str, str]:
    """A container's environment; fields: what its pod's annotations hold."""
    result = {}
    for entry in container.get("env", []):
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        result[entry["name"]] = fields[re.fullmatch(r"metadata\.annotations\['(.*)'\]", path)[1]] if path else entry["value"]
    assert all(isinstance(value, str) for value in result.values())  # Kubernetes takes no numbers
    return result


def jobset():
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    name, coordinator, [job] = manifest["metadata"]["name"], manifest["spec"]["coordinator"], manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], job["replicas"], coordinator["replicatedJob"]) == (spec["completions"], 1, job["name"])
    address = f"{name}-{job['name']}-{coordinator['jobIndex']}-{coordinator['podIndex']}.{name}"
    [container] = spec["template"]["spec"]["containers"]
    given = pod_environ(container, **{"jobset.sigs.k8s.io/coordinator": address})
    return [container] * spec["parallelism"], [given | {"JOB_COMPLETION_INDEX": str(i)} for i in range(spec["parallelism"])], "neva-workers-0-0.neva:6666"


def jaxjob():
    manifest = yaml.safe_load((LAUNCH / "jaxjob.yaml").read_text())
    worker = manifest["spec"]["jaxReplicaSpecs"]["Worker"]
    [container] = worker["template"]["spec"]["containers"]
    assert (manifest["kind"], container["name"]) == ("JAXJob", "jax")
    size, name = worker["replicas"], manifest["metadata"]["name"]
    given = {"COORDINATOR_ADDRESS": f"{name}-worker-0", "COORDINATOR_PORT": "6666", "NUM_PROCESSES": str(size)}
    return [container] * size, [{**pod_environ(container), **given, "PROCESS_ID": str(i)} for i in range(size)], "neva-worker-0:6666"


def pytorchjob():
    manifest = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    replicas, name = manifest["spec"]["pytorchReplicaSpecs"], manifest["metadata"]["name"]
    containers = [kind["template"]["spec"]["containers"][0] for kind in (replicas["Master"], replicas["Worker"]) for _ in range(kind["replicas"])]
    assert {container["name"] for container in containers} == {"pytorch"} and replicas["Master"]["replicas"] == 1
    given = {"MASTER_ADDR": f"{name}-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": str(len(containers))}
    return containers, [{**pod_environ(c), **given, "RANK": str(i)} for i, c in enumerate(containers)], "neva-master-0:23456"


@pytest.mark.parametrize("read", [jobset, jaxjob, pytorchjob])
def test_manifests(read):
    containers, environs, coordinator = read()
    specs = [detect(environ) for environ in environs]
    assert specs == [ClusterSpec(specs[0].launcher, coordinator, len(environs), i) for i in range(len(environs))]
    for container in containers:
        check_command([*container["command"], *container["args"]], container["resources"]["limits"]["nvidia.com/gpu"], len(environs))


def test_slurm():
    script = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    nodes, tasks, gpus = (int(options[name]) for name in ("nodes", "ntasks-per-node", "gpus-per-node"))
    for process in range(nodes * tasks):
        environ = {
            "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": f"gpu[1-{nodes}]", "SLURM_STEP_NUM_TASKS": str(nodes * tasks),
            "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})", "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process % tasks),
            "SLURM_NODEID": str(process // tasks), "SLURM_GPUS_ON_NODE": str(gpus),
        }  # fmt: skip
        assert detect(environ) == ClusterSpec("Slurm", "gpu1:61517", nodes * tasks, process)
    [line] = [line for line in script.splitlines() if line.startswith("srun ")]
    [example] = re.findall(r"^#   sbatch launch/slurm.sbatch (.*)$", script, re.MULTILINE)
    command = line[line.index("python ") :].replace('"$SLURM_NNODES"', str(nodes)).replace('"$@"', example)
    check_command(shlex.split(command), gpus, nodes)


def check_command(command, gpus, nodes):
    """The command is one that train.py takes, and asks for the devices that the launcher gives."""
    assert command[:2] == ["python", "train.py"]
    config = cli.parse([argument.replace("configs/", f"{ROOT}/configs/") for argument in command[1:]])["config"]
    assert (config.trainer.devices, config.trainer.num_nodes) == (gpus, nodes)


def test_the_image_installs_what_the_package_offers():
    import tomllib

    text = (LAUNCH / "Dockerfile").read_text()
    [extra] = re.findall(r'pip install --no-cache-dir -e "\.\[(\w+)\]"', text)
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
