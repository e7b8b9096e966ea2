"""Several hosts: the launch scripts, run for real between namespaces that are hosts to each other, and by a real Slurm."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import yaml

from train.run_directory import checkpoint_steps

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
CONFIG = "configs/language/quickstart.yaml"
SMALL = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.mlp_width=64",
    "train.global_batch_size=4",
    "schedule.warmup_steps=2",
    "train.steps=160",
    "checkpoint.every_steps=10",
    "evaluate.every_steps=0",
    "train.hang_seconds=30",
    "monitor.every_steps=1000",
]


def _steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def _has_trained_whole(run: Path) -> bool:
    status = json.loads((run / "status.json").read_text())
    return status["state"] == "finished" and _steps(run) == list(range(1, 161))


def test_over_ssh_a_host_is_lost_and_comes_back(make_host, wikipedia, wait_until, tmp_path):
    first, second = make_host("node-a"), make_host("node-b")
    first.connect(second)
    (tmp_path / "hostfile").write_text("# two hosts\nnode-a slots=1\nnode-b slots=1\n")
    run = tmp_path / "run"
    command = ["launch/cluster.sh", str(tmp_path / "hostfile"), CONFIG, f"run.dir={run}", *SMALL]
    supervisor = first.start(command)
    wait_until(lambda: checkpoint_steps(run / "checkpoints"))
    assert len(first.ranks()) == len(second.ranks()) == 1

    second.lose()
    wait_until(lambda: "supervisor: waiting" in first.output())
    assert first.ranks() == []
    second = make_host("node-b")
    first.connect(second)
    before = len(_steps(run))
    wait_until(lambda: len(_steps(run)) > before and second.ranks())

    # A signal to the supervisor reaches the ranks of both hosts.
    first.processes("launch.supervise")[0].send_signal(signal.SIGTERM)
    assert supervisor.wait(60) == 75, first.output()
    assert json.loads((run / "status.json").read_text())["reason"] == "SIGTERM"
    assert first.ranks() == second.ranks() == []
    assert first.start(command).wait(120) == 0, first.output()
    assert _has_trained_whole(run)


def test_torchrun_on_each_host_restarts_when_a_rank_of_one_dies(make_host, wikipedia, wait_until, tmp_path):
    """What a pod of launch/kubernetes.yaml runs."""
    hosts = [make_host("node-a"), make_host("node-b")]
    hosts[0].connect(hosts[1])
    run = tmp_path / "run"
    command = ["launch/torchrun.sh", CONFIG, f"run.dir={run}", *SMALL]
    environment = {"NNODES": "2", "MASTER_ADDR": "node-a", "RANKS": "1"}
    supervisors = [host.start(command, NODE_RANK=str(rank), **environment) for rank, host in enumerate(hosts)]
    wait_until(lambda: checkpoint_steps(run / "checkpoints"))
    hosts[1].ranks()[0].kill()
    for supervisor, host in zip(supervisors, hosts, strict=True):
        assert supervisor.wait(120) == 0, host.output()
    assert _has_trained_whole(run)
    log = (run / "log.txt").read_text()
    assert log.count("supervisor: start:") == 2 and log.count("supervisor: end:") == 1  # host 0 alone writes it


def test_slurm_requeues_a_job_that_was_told_to_stop(slurm, wikipedia, wait_until, tmp_path):
    run, output = tmp_path / "run", tmp_path / "job.txt"
    options = ["--gpus-per-node=0", "--ntasks-per-node=1", f"--output={output}"]
    job = slurm("sbatch", *options, "launch/slurm.sbatch", CONFIG, f"run.dir={run}", *SMALL).split()[-1]
    wait_until(lambda: checkpoint_steps(run / "checkpoints"))
    slurm("scancel", "--batch", "--signal=USR1", job)  # what it sends before the time limit
    wait_until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job))
    assert json.loads((run / "status.json").read_text())["reason"] == "SIGUSR1"
    before = len(_steps(run))
    wait_until(lambda: len(_steps(run)) > before)

    slurm("kill", "-KILL", str(json.loads((run / "status.json").read_text())["pid"]))  # rank 0
    wait_until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job))
    assert _has_trained_whole(run)
    log = (run / "log.txt").read_text()
    assert log.count("supervisor: start:") == 3 and f"continuing after step {before}" in log


def test_the_kubernetes_manifest():
    """Against the schema of Kubernetes, and against what its fields have to agree about."""
    import kubernetes_validate

    service, job = yaml.safe_load_all((REPOSITORY / "launch" / "kubernetes.yaml").read_text())
    for resource in (service, job):
        kubernetes_validate.validate(resource, "1.31", strict=True)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["RANKS"])
    name = job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["selector"] == {"job-name": name}
    assert environment["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert all((REPOSITORY / file).is_file() for file in container["command"][:2])
    script = (REPOSITORY / container["command"][0]).read_text()
    assert set(environment) <= set(re.findall(r"\$\{(\w+):-", script))
