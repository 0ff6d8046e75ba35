"""A real Slurm of one node, for tests: munge, slurmctld and slurmd from the distribution, on its name's address only.

    python -m tests.slurm.one_node start FOLDER      prints the environment that uses it
    python -m tests.slurm.one_node stop FOLDER

No systemd, no cgroups and no accounting database; cores, memory and GPUs are really scheduled (the GPUs are device
nodes that nothing opens). Everything it writes lies below FOLDER, and it stops only what it started.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo")
PACKAGES = "munge slurmctld slurmd slurm-client"
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol", "sacct")
GPUS = {"t4": 1, "a100": 1}  # GRES type: how many


def missing() -> list[str]:
    """Programs that are not there; Debian's packages for them are :data:`PACKAGES`."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


class OneNodeSlurm:
    """A controller and one node.

    Parameters
    ----------
    folder
        Where configuration, state and logs go.
    cpus, memory_mb
        What the node offers.
    gpus
        How many GPUs of each GRES type it pretends to have.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cpus: int | None = None,
        memory_mb: int = 12_000,
        gpus: Mapping[str, int] = GPUS,
    ) -> None:
        self.folder = folder.resolve()
        self.cpus, self.memory_mb, self.gpus = cpus or os.cpu_count() or 1, memory_mb, dict(gpus)
        self.host = socket.gethostname().split(".")[0]
        self.address = _address(self.host)
        self.ports = _free_ports(2, self.address)
        self.configuration = self.folder / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the commands of this Slurm first on PATH."""
        return {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{_path()}",
            "SLURM_CONF": str(self.configuration),
        }

    def __enter__(self) -> OneNodeSlurm:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Write the configuration, start the three daemons and wait until the node is idle."""
        absent = missing()
        if absent:
            raise RuntimeError(
                f"Slurm is not installed: {', '.join(absent)} missing; apt-get install {PACKAGES}"
            )
        self._write_configuration()
        munge = [
            f"--key-file={self.folder / 'etc' / 'munge.key'}",
            f"--socket={self.folder / 'run' / 'munge.sock'}",
            f"--pid-file={self.folder / 'run' / 'munged.pid'}",
            f"--log-file={self.folder / 'log' / 'munged.log'}",
            f"--seed-file={self.folder / 'run' / 'munge.seed'}",
        ]
        self._launch("munged", "--foreground", "--force", *munge)
        _wait(lambda: (self.folder / "run" / "munge.sock").exists(), 10, "munged made no socket")
        self._launch("slurmctld", "-D", "-i", "-f", str(self.configuration))
        self._launch("slurmd", "-D", "-f", str(self.configuration), "-N", self.host)
        try:
            _wait(
                lambda: self.run("sinfo", "-h", "-o", "%T").strip() == "idle",
                40,
                "the node is not idle",
            )
        except TimeoutError:
            logs = "".join(
                path.read_text(errors="replace")[-2000:] for path in (self.folder / "log").iterdir()
            )
            self.stop()
            raise RuntimeError(f"Slurm did not start:\n{logs}") from None

    def run(self, *command: str) -> str:
        """Standard output of one of Slurm's commands; empty when it fails."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30
        )
        return done.stdout if done.returncode == 0 else ""

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Id of each job that the controller remembers, with its state and its comment (Snakemake: rule and files)."""
        lines = self.run("squeue", "-h", "-a", "-t", "all", "-o", "%i\t%T\t%k").splitlines()
        return {
            job: (state, comment) for job, state, comment in (line.split("\t", 2) for line in lines)
        }

    def stop(self) -> None:
        """Cancel this Slurm's jobs and end the daemons that :meth:`start` started."""
        self.run("scancel", "--full", f"--user={os.getuid()}")
        for name in ("slurmd", "slurmctld", "munged"):
            record = self.folder / "run" / f"{name}.started"
            if record.exists():
                _end(int(record.read_text()), name)
                record.unlink()

    def _launch(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=_path())
        with open(self.folder / "log" / f"{name}.out", "wb") as output:
            process = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (self.folder / "run" / f"{name}.started").write_text(str(process.pid))

    def _write_configuration(self) -> None:
        for name in ("etc", "state", "spool", "run", "log", "bin", "devices"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("", "run"):  # munged refuses a folder that others can't enter
            (self.folder / name).chmod(0o755)
        key = self.folder / "etc" / "munge.key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
            key.chmod(0o400)
        user = subprocess.run(
            ["id", "-un"], capture_output=True, text=True, check=True
        ).stdout.strip()
        gres = ",".join(f"gpu:{kind}:{count}" for kind, count in self.gpus.items())
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{self.host}({self.address})",
            "SlurmUser": user,
            "SlurmdUser": user,
            "SlurmctldPort": self.ports[0],
            "SlurmdPort": self.ports[1],
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "AuthInfo": f"socket={self.folder / 'run' / 'munge.sock'}",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool",
            "SlurmctldPidFile": self.folder / "run" / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "run" / "slurmd.pid",
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",  # the address of its own name, not all interfaces
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/linux",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0",
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",
            "AccountingStorageType": "accounting_storage/none",
            "MinJobAge": 86400,  # squeue has to remember jobs until Snakemake asks
            "ReturnToService": 2,
            "EnforcePartLimits": "ALL",  # a job that can never fit is refused, not left waiting
            "MailProg": "/bin/true",
            "KillWait": 3,
            "RequeueExit": 75,
            "MpiDefault": "none",
            "DefMemPerCPU": 500,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [
            f"NodeName={self.host} NodeAddr={self.address} CPUs={self.cpus} RealMemory={self.memory_mb} Gres={gres}"
            " State=UNKNOWN",
            *(
                f"PartitionName={name} Nodes={self.host} Default={default} MaxTime=UNLIMITED State=UP OverSubscribe=NO"
                for name, default in (("main", "YES"), ("gpu", "NO"))
            ),
        ]
        self.configuration.write_text("\n".join(lines) + "\n")
        devices = []
        for kind, count in self.gpus.items():
            for number in range(count):
                device = self.folder / "devices" / f"{kind}{number}"
                if not device.exists():
                    os.mknod(device, 0o020666, os.makedev(1, 3))  # /dev/null under another name
                devices.append(f"NodeName={self.host} Name=gpu Type={kind} File={device}")
        (self.folder / "etc" / "gres.conf").write_text("\n".join(devices) + "\n")
        (self.folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        # The plugin's inner srun loses SLURM_CONF: these put it back.
        for name in COMMANDS:
            program = shutil.which(name, path=_path())
            if program:
                wrapper = self.folder / "bin" / name
                wrapper.write_text(
                    f'#!/bin/sh\nSLURM_CONF={self.configuration} exec {program} "$@"\n'
                )
                wrapper.chmod(0o755)


def _address(host: str) -> str:
    """The address that the host's name has, to which the daemons bind: on Debian 127.0.1.1, elsewhere 127.0.0.1."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return "127.0.0.1"


def _free_ports(count: int, address: str) -> list[int]:
    """Ports of the loopback that nobody listens on at present."""
    sockets = [socket.create_server((address, 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def _wait(done: object, seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():  # type: ignore[operator]
            return
        time.sleep(0.2)
    raise TimeoutError(otherwise)


def _end(pid: int, name: str) -> None:
    """End a process if the number still belongs to that program."""
    try:
        if not re.match(name[:15], Path(f"/proc/{pid}/comm").read_text()):
            return
        os.kill(pid, signal.SIGTERM)
        _wait(lambda: not Path(f"/proc/{pid}").exists() or "\tZ" in _status(pid), 10, name)
    except (FileNotFoundError, ProcessLookupError):
        return
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "State:\tZ"


if __name__ == "__main__":
    action, place = sys.argv[1:]
    slurm = OneNodeSlurm(Path(place))
    getattr(slurm, action)()
    if action == "start":
        print(f"export SLURM_CONF={slurm.configuration} PATH={slurm.folder / 'bin'}:$PATH")
