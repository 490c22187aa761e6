"""The configs of clusters, started as clusters start them: by torchrun, and by a stand-in for SLURM."""

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import FSDPStrategy
from small_runs import module, trainer
from test_configs import ROOT, adapted

import dpo_lightning.cli
from dpo_lightning.callbacks import GracefulStop
from dpo_lightning.errors import UsageError

TESTS = Path(__file__).parent
SCRIPTS = sorted((ROOT / "configs/slurm").glob("*.sbatch"))
NEEDS_GLOO = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")
# Starts a task of a step for every slot that SLURM's variables name, and ends with the highest code, as srun does.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) \
        SLURM_NODEID=$((task / SLURM_NTASKS_PER_NODE)) "$@" &
    tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    ((code > worst)) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol.txt
"""


def config_of(name):
    return yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())


def prepare(folder, model, name, devices, num_nodes, **changes):
    """A folder in which the config of that name is one for a tiny model."""
    config = adapted(config_of(name), folder, model, devices, num_nodes)
    config["data"]["init_args"].update(changes)
    (folder / "configs").mkdir(exist_ok=True)
    (folder / f"configs/{name}.yaml").write_text(yaml.safe_dump(config))


def environment(**variables):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = os.pathsep.join([str(TESTS), *sys.path])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def start(folder, *command, **variables):
    return subprocess.Popen(
        command, cwd=folder, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process):
    """Exit code and what was said."""
    said, _ = process.communicate(timeout=280)
    return process.returncode, said


def steps_saved(folder):
    """Steps of sharded checkpoints that are complete."""
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in folder.rglob("meta.pt"))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


FIT = ("-m", "dpo_lightning", "fit", "--config")


@NEEDS_GLOO
def test_one_node_by_torchrun(tiny_llama, tmp_path):
    prepare(tmp_path, tiny_llama, "fsdp", devices=2, num_nodes=1)
    run = start(tmp_path, "torchrun", "--standalone", "--nproc_per_node", "2", *FIT, "configs/fsdp.yaml")
    code, said = ended(run)
    assert code == 0, said
    assert steps_saved(tmp_path)[-1] == 2


@pytest.mark.slow
@NEEDS_GLOO
def test_two_nodes_that_meet_at_one_address(tiny_llama, tmp_path):
    prepare(tmp_path, tiny_llama, "multinode", devices=1, num_nodes=2)
    meeting = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", free_port())
    nodes = [
        start(tmp_path, "torchrun", *meeting, "--node_rank", str(node), *FIT, "configs/multinode.yaml")
        for node in range(2)
    ]
    for code, said in map(ended, nodes):
        assert code == 0, said
    assert steps_saved(tmp_path)[-1] == 2


def directives(script):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script.read_text(), re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_ask_for_what_their_config_uses(script):
    subprocess.run(["bash", "-n", script], check=True)
    asked, trainer, text = directives(script), config_of(script.stem)["trainer"], script.read_text()
    assert int(asked["nodes"]) == trainer.get("num_nodes", 1)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == str(trainer["devices"])
    assert asked["signal"].startswith("USR1@")
    assert "#SBATCH --requeue\n" in text
    assert re.search(rf"^srun .* --config configs/{script.stem}.yaml --resume true$", text, re.MULTILINE)
    assert re.search(rf"^# Without SLURM.*torchrun .*--nproc_per_node {trainer['devices']} .*--config configs/"
                     rf"{script.stem}.yaml --resume true$", text, re.MULTILINE)  # fmt: skip
    assert text.splitlines()[1].endswith(f"sbatch configs/slurm/{script.name}")


def test_every_cluster_config_has_a_script():
    assert [path.stem for path in SCRIPTS] == ["fsdp", "multinode"]


@NEEDS_GLOO
@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_nodes", "per_node"), [("fsdp", 1, 2), ("multinode", 2, 1)])
def test_under_slurm_a_noticed_job_is_requeued_and_goes_on(name, num_nodes, per_node, tiny_llama, tmp_path):
    prepare(tmp_path, tiny_llama, name, per_node, num_nodes, batch_size=16)
    path = tmp_path / f"configs/{name}.yaml"
    quiet = yaml.safe_load(path.read_text())
    notice = {"class_path": "notices.Notice", "init_args": {"step": 4, "name": "SIGUSR1", "rank": 1}}
    noticed = {**quiet, "trainer": {**quiet["trainer"], "callbacks": [*quiet["trainer"]["callbacks"], notice]}}
    for command, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / command).write_text(text)
        (tmp_path / command).chmod(stat.S_IRWXU)
    slurm = {
        "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": f"dpo-{name}", "SLURM_NTASKS": "2", "SLURM_NNODES": str(num_nodes),
        "SLURM_NTASKS_PER_NODE": str(per_node), "SLURM_NODELIST": "127.0.0.1", "SLURM_CPUS_PER_TASK": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    script = ROOT / f"configs/slurm/{name}.sbatch"
    path.write_text(yaml.safe_dump(noticed))
    code, said = ended(start(tmp_path, "bash", str(script), **slurm))
    assert code == 138, said
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4242\n"
    stopped = next(tmp_path.rglob("stopped-step=5.ckpt"))
    path.write_text(yaml.safe_dump(quiet))
    code, said = ended(start(tmp_path, "bash", str(script), **slurm))
    assert code == 0, said
    assert f"Restored all states from the checkpoint at {stopped}" in said
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4242\n"
    assert not stopped.exists()
    assert steps_saved(tmp_path)[-1] == 9


def test_under_slurm_requeueing_is_the_scripts(tiny_llama, tmp_path, monkeypatch):
    prepare(tmp_path, tiny_llama, "fsdp", devices=1, num_nodes=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    slurm = {"JOB_ID": "4242", "JOB_NAME": "one", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    cli = dpo_lightning.cli.run(["fit", "--config", "configs/fsdp.yaml", "--trainer.max_steps", "1"])
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    assert any(isinstance(callback, GracefulStop) for callback in cli.trainer.callbacks)


def test_fsdp1_is_refused_with_the_change(tiny_llama, tmp_path, monkeypatch):
    made = module(tiny_llama)
    made.trainer = trainer(tmp_path)
    monkeypatch.setattr(made.trainer._accelerator_connector, "strategy", FSDPStrategy())
    with pytest.raises(UsageError, match="strategy: fsdp2\n  precision: bf16-mixed"):
        made.setup("fit")
