"""A Slurm cluster with one node on this machine, in its own folder: munged, slurmctld, slurmd."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# A requeued job starts when its credential has expired, which takes two minutes by default.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def slurm(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, f"{command}: {process.stderr}"
    return process.stdout


def wait_for(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timeout after {seconds:.0f} s: {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Path]:
    """Start the cluster, set SLURM_CONF, yield the folder; in the end stop all jobs and daemons."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged requires that everybody can reach its socket
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    ports = {"controller_port": free_port(), "node_port": free_port()}
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=socket.gethostname(), **ports))
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "seed", "log")]
    munge = ["munged", "-F", f"--key-file={key}", f"--socket={folder}/munge.socket", *files]
    daemons = []
    os.environ["SLURM_CONF"] = str(config)
    try:
        with (folder / "output").open("w") as output:
            for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output))
                if command is munge:
                    wait_for((folder / "munge.socket").exists, 20, "munged")
        wait_for(lambda: "idle" in _nodes(), 60, f"a node: see {folder}")
        yield folder
    finally:
        try:
            if len(daemons) == 3 and _nodes():
                slurm("scancel", "--user=root")
                wait_for(lambda: not slurm("squeue", "--noheader"), 60, "the jobs to end")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                try:
                    daemon.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            del os.environ["SLURM_CONF"]
    shutil.rmtree(folder)  # kept after an error, for its logs


def _nodes() -> str:
    process = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60)
    return process.stdout
