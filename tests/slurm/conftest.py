"""A real Slurm of two nodes on this machine, started for the tests that ask for it."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SLURM = Path(__file__).parent.parent.parent / ".venv" / "slurm"
LIBRARIES = SLURM / "usr" / "lib" / "x86_64-linux-gnu"
START_TIMEOUT_S = 60

# Source: slurm.conf(5). No munge, no cgroups, one host that plays two nodes on two ports, loopback only.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CryptoType=crypto/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
CommunicationParameters=NoInAddrAny
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
PluginDir={plugins}
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool-%n
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd-%n.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, kw_only=True)
class SlurmCluster:
    """A running Slurm of the nodes n1 and n2."""

    config: Path

    def environ(self) -> dict[str, str]:
        """The environment in which srun, sbatch and the rest find this cluster."""
        path = f"{SLURM}/usr/bin:{os.environ['PATH']}"
        # Slurm's client tools look for their plugins by configuration and for libslurm by path.
        libraries = f"{LIBRARIES}:{LIBRARIES}/slurm-wlm"
        return os.environ | {"PATH": path, "LD_LIBRARY_PATH": libraries, "SLURM_CONF": str(self.config)}

    def run(self, *command: str, timeout_s: float = 120, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run one client command; its outcome, whatever it is."""
        return subprocess.run(
            command, env=self.environ() | environ, timeout=timeout_s, capture_output=True, text=True, check=False
        )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A Slurm of two nodes with two CPUs each; skipped where `tests/slurm/install.sh .venv/slurm` was not run."""
    if not (SLURM / ".ready").exists():
        pytest.skip("no Slurm here; tests/slurm/install.sh .venv/slurm unpacks it")
    work = tmp_path_factory.mktemp("slurm")
    (work / "state").mkdir()
    for node in ("n1", "n2"):
        (work / f"spool-{node}").mkdir()
    host = socket.gethostname()
    config = work / "slurm.conf"
    config.write_text(
        CONFIG.format(
            host=host, ports=free_ports(3), user=getpass.getuser(), plugins=LIBRARIES / "slurm-wlm", work=work
        )
    )
    cluster = SlurmCluster(config=config)
    slurmd = ["slurmd-wlm", "-D", "-d", str(SLURM / "usr" / "sbin" / "slurmstepd-wlm")]
    daemons = [["slurmctld-wlm", "-D", "-c"], [*slurmd, "-N", "n1"], [*slurmd, "-N", "n2"]]
    with contextlib.ExitStack() as stack:
        for index, (name, *flags) in enumerate(daemons):
            log = stack.enter_context((work / f"daemon-{index}.out").open("w"))
            process = subprocess.Popen(
                [str(SLURM / "usr" / "sbin" / name), *flags],
                env=cluster.environ(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        wait_until_idle(cluster, work)
        yield cluster


def wait_until_idle(cluster: SlurmCluster, work: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if cluster.run("sinfo", "-h", "-N", "-o", "%T").stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.2)  # polling a daemon that has no way to tell
    logs = "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in sorted(work.glob("*.out")))
    pytest.fail(f"Slurm did not come up in {START_TIMEOUT_S} s\n{logs}")
