"""A Slurm cluster of one node with two CPUs, for tests: without systemd, all of it in one folder.

  python tests/slurm_cluster.py start /tmp/cluster   # prints the setting of SLURM_CONF to export
  python tests/slurm_cluster.py stop /tmp/cluster    # as often as you like

Partition `low` is preempted by partition `high`: its jobs get their user signal (submitit's USR2),
half a minute to save, and are queued again. The path must be short: the folder has a socket in it.
"""

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = "apt-get install slurmctld slurmd slurm-client munge"
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
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
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in (*DAEMONS, "sbatch", "srun") if not find(name)]
    return f"no {', '.join(absent)} here: {PACKAGES}" if absent else None


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def start(folder: Path) -> dict[str, str]:
    """Start the daemons and wait for the node; the environment that a user of it needs.

    RuntimeError, with the end of the logs, where they do not come up.
    """
    folder = folder.resolve()
    for name in ("", "state", "spool"):
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    host = socket.gethostname().split(".")[0]
    ctld_port, d_port = free_ports(2)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            folder=folder, host=host, user=getpass.getuser(), ctld_port=ctld_port, d_port=d_port
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    try:
        launch(
            folder,
            env,
            "munged",
            "--foreground",
            "--force",
            f"--socket={folder}/munge.sock",
            *(f"--{name}-file={folder}/munge.{name}" for name in ("key", "seed", "pid")),
        )
        wait_for((folder / "munge.sock").exists, folder, "munged")
        launch(folder, env, "slurmctld", "-D", "-i")
        launch(folder, env, "slurmd", "-D", "-N", host)
        wait_for(lambda: "idle" in ask(env, "sinfo", "-h", "-o", "%T"), folder, "the node")
    except BaseException:
        stop(folder)
        raise
    return env


def launch(folder: Path, env: dict[str, str], name: str, *arguments: str) -> None:
    """Start a daemon in a session of its own and note its process."""
    with open(folder / f"{name}.out", "w") as output:
        child = subprocess.Popen(
            [find(name), *arguments],
            env={**os.environ, **env},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    (folder / f"{name}.process").write_text(str(child.pid))


def stop(folder: Path) -> None:
    """End all jobs and daemons of the cluster in `folder`; nothing where there is none."""
    folder = folder.resolve()
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    if is_running(folder, "slurmctld") and is_running(folder, "slurmd"):
        ask(env, "scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + 15
        while ask(env, "squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.5)
    for name in reversed(DAEMONS):
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 10
            process = is_running(folder, name)
            if process:
                os.kill(process, number)
            while is_running(folder, name) and time.monotonic() < deadline:
                time.sleep(0.1)
        (folder / f"{name}.process").unlink(missing_ok=True)


def is_running(folder: Path, name: str) -> int | None:
    """The process of one of our daemons; never another one that got its number since."""
    try:
        process = int((folder / f"{name}.process").read_text())
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        place = os.readlink(f"/proc/{process}/cwd")
    except (OSError, ValueError):
        return None
    ours = os.path.basename(command[0]) == name.encode() and place == str(folder)
    return process if ours else None


def ask(env: dict[str, str], *command: str) -> str:
    """What a Slurm command prints, or nothing where it fails."""
    try:
        return subprocess.run(
            command, env={**os.environ, **env}, capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def wait_for(condition, folder: Path, what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = [path for path in sorted(folder.glob("*.*")) if path.suffix in (".log", ".out")]
            ends = [f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in logs]
            raise RuntimeError(f"{what} did not come up in {seconds:.0f} s\n" + "\n".join(ends))
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit(__doc__)
    if sys.argv[1] == "stop":
        stop(Path(sys.argv[2]))
    elif missing():
        sys.exit(missing())
    else:
        for name, value in start(Path(sys.argv[2])).items():
            print(f"export {name}={shlex.quote(value)}")
