#!/usr/bin/env python3
"""Labels the digits on Slurm with deploy/slurm/submit.sh while a node is lost, and compares the result with an undisturbed run.

    tests/slurm/run.py target/release/elbo

One machine acts as controller and two nodes: munged, slurmctld and two slurmd from Debian's packages, all below a temporary
directory with their own key, sockets and ports, so that they don't disturb a Slurm that this machine may have. Needs root,
since slurmd starts jobs as their owners. Missing packages are installed. Takes about two minutes; all processes are ended,
however the test ends.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "cli/demo"
PACKAGES = ["slurm-wlm", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "sinfo"]
WORKERS = 3
SHARDS = 15
# The longest wait.
PATIENCE = 240

SLURM_CONF = """\
ClusterName=elbo-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
AuthType=auth/munge
# A requeued job starts once its old credential has expired.
AuthInfo=socket={home}/munge/socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
# A job goes to the node with the most free resources, so that both nodes get some.
SelectTypeParameters=CR_Core,CR_LLN
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=120
JobRequeue=1
KillWait=5
MinJobAge=3600
ReturnToService=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Failed(Exception):
    """The test failed or can't run."""


def say(text):
    print(f"slurm: {text}", flush=True)


def need(condition, complaint):
    if not condition:
        raise Failed(complaint)


def install():
    """Installs Slurm and munge if they are missing."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if not missing:
        return
    need(shutil.which("apt-get"), f"{', '.join(missing)} missing: install Slurm and munge")
    say(f"installing {' '.join(PACKAGES)}")
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    get = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *PACKAGES]
    if subprocess.run(get, stderr=subprocess.DEVNULL, **quiet).returncode != 0:
        subprocess.run(["apt-get", "-qq", "update"], check=True, **quiet)
        subprocess.run(get, check=True, **quiet)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def processes():
    """The processes of this machine, as (id, parent, name, environment)."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, rest = re.match(r"\d+ \((.*)\) . (\d+)", (entry / "stat").read_text(), re.S).groups()
            yield int(entry.name), int(rest), name, (entry / "environ").read_bytes().split(b"\0")
        except (OSError, AttributeError):
            continue  # the process has ended


class Cluster:
    """A Slurm cluster of two nodes on this machine, below `home`."""

    def __init__(self, home):
        self.home = home
        self.conf = home / "slurm.conf"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "ELBO_"))}
        self.environment["SLURM_CONF"] = str(self.conf)

    def start(self):
        home = self.home
        for directory in ["state", "node1", "node2", "munge"]:
            (home / directory).mkdir(mode=0o755)
        key = home / "munge/key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        controller, *ports = free_ports(3)
        nodes = "\n".join(
            f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"
            for i, port in enumerate(ports, 1)
        )
        self.conf.write_text(SLURM_CONF.format(home=home, host=host, controller_port=controller, nodes=nodes))
        # Nothing here uses control groups, but slurmd needs a plugin for them: the disabled one, if this version has it
        # (23.02).
        version = tuple(int(n) for n in re.findall(r"\d+", self.ask("slurmd", "-V"))[:2])
        plugin = "disabled" if version >= (23, 2) else f"cgroup/v1\nCgroupMountpoint={home}/cgroup"
        (home / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

        munge = home / "munge"
        # --force: the temporary directory is below a world-writable one.
        self.daemon("munged", "--force", f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
                    f"--log-file={munge}/log", f"--seed-file={munge}/seed")
        self.daemon("slurmctld", "-c")
        for node in ["node1", "node2"]:
            self.daemon("slurmd", "-N", node)
        self.until("both nodes idle", lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, 60)

    def daemon(self, *command):
        log = (self.home / "starting.log").open("a")
        done = subprocess.run(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        need(done.returncode == 0, f"{command[0]} does not start: {(self.home / 'starting.log').read_text()}")

    def ask(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    def until(self, what, condition, patience=PATIENCE):
        end = time.monotonic() + patience
        while not (seen := condition()):
            need(time.monotonic() < end, f"timed out after {patience} s waiting for: {what}")
            time.sleep(0.2)
        return seen

    def job(self, number):
        """Slurm's data about a job, or about one task of an array."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", str(number))))

    def of_node(self, node):
        """The processes of a node: its slurmd, the step daemons and the jobs' processes."""
        marks = {f"SLURM_CONF={self.conf}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = {process: parent for process, parent, _, environment in processes() if marks <= set(environment)}
        names = {process: name for process, _, name, _ in processes()}
        # The step daemons are the jobs' parents. They have no variable that identifies them.
        stepds = {parent for parent in found.values() if names.get(parent, "").startswith("slurmstepd")}
        slurmd = int((self.home / f"{node}.pid").read_text())
        return [slurmd, *stepds, *found]

    def lose(self, node):
        """Takes a node away: kills everything on it and marks it as down in Slurm."""
        for process in self.of_node(node):
            kill(process)
        need(subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=lost"], env=self.environment).returncode == 0,
             f"{node} could not be marked down")

    def stop(self):
        """Kills everything that was started below `home`."""
        mark = f"SLURM_CONF={self.conf}".encode()
        for _ in range(10):
            # Jobs and daemons have this configuration in their environment.
            mine = [process for process, _, _, environment in processes() if mark in environment and process != os.getpid()]
            for process in mine:
                kill(process)
            if not mine:
                break
            time.sleep(0.2)
        # They are now children of this process: see `adopt`.
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def adopt():
    """Makes orphans below this process its children: in a container there may be no other process that waits for them."""
    set_child_subreaper = 36
    ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0)


def kill(process):
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


def elbo(program, *arguments):
    done = subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    need(done.returncode == 0, f"elbo {' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def predictions(out):
    return {file.name: file.read_bytes() for file in (out / "predictions").iterdir()}


def test(program, cluster, work):
    job = work / "job.toml"
    job.write_text(f"""\
images = "{DEMO / 'images'}"
classes = "{DEMO / 'classes.csv'}"
model = "{DEMO / 'model'}"
keep = [3, 1]
samples = [8, 20]
label-from = "parent"
shard-size = 25
""")
    say("labelling undisturbed")
    elbo(program, "label", "--job", job, "--out", work / "alone", "--batch", "16", "--progress", "none")

    say("submitting")
    out, run = work / "out", work / "run"
    settings = {"ELBO": str(program), "WORKERS": str(WORKERS), "GPUS": "0", "ELBO_HOST": "127.0.0.1", "ELBO_BIND": "127.0.0.1",
                "ELBO_BATCH": "16", "ELBO_PATIENCE": "15",
                "COORDINATOR_SBATCH": "--cpus-per-task=1 --mem=0", "WORKER_SBATCH": "--cpus-per-task=1 --mem=0"}
    submitted = subprocess.run([REPOSITORY / "deploy/slurm/submit.sh", job, out, run], env={**cluster.environment, **settings},
                               capture_output=True, text=True, cwd=work)
    need(submitted.returncode == 0, f"submit.sh: {submitted.stderr}")
    print(submitted.stdout, end="")
    coordinator, workers = re.search(r"coordinator: job (\d+); workers: job (\d+)", submitted.stdout).groups()
    tasks = [f"{workers}_{i}" for i in range(WORKERS)]
    need((run / "token").stat().st_mode & 0o77 == 0, "other users can read the token")

    def committed():
        return len(list(out.glob("predictions/*.parquet")))

    def where(number):
        known = cluster.job(number)
        return known.get("NodeList") if known.get("JobState") == "RUNNING" else None

    cluster.until("a shard", lambda: committed() >= 1)
    limited, *_ = tasks
    say(f"the coordinator and worker {limited} reach their time limits")
    for number in [coordinator, limited]:
        # The signal that --signal sends ahead of the limit.
        scancel = ["scancel", "--batch", "--signal=USR1", number]
        need(subprocess.run(scancel, env=cluster.environment).returncode == 0, f"{number} can't be signalled")
    for number in [coordinator, limited]:
        cluster.until(f"job {number} requeues itself", lambda: cluster.job(number).get("Restarts") == "1", 60)
    lost = cluster.until("the coordinator runs again", lambda: where(coordinator), 60)
    places = {task: cluster.until(f"worker {task} runs", lambda: where(task), 60) for task in tasks}
    lost_workers = [task for task, node in places.items() if node == lost]
    stay = [task for task, node in places.items() if node != lost and task != limited]
    need(lost_workers and stay, f"coordinator on {lost}, workers on {places}: not spread as intended")

    resumed = committed()
    cluster.until("another shard", lambda: committed() > resumed)
    before = committed()
    need(before < SHARDS, "the job was done before a node could be lost")
    say(f"{lost} is lost with the coordinator and worker {' '.join(lost_workers)}, at {before} of {SHARDS} shards")
    cluster.lose(lost)

    cluster.until("the coordinator's end", lambda: (run / "ended").exists())
    need((run / "ended").read_text().strip() == "done", f"the job ended with: {(run / 'ended').read_text()}")
    for number in [coordinator, *tasks]:
        cluster.until(f"the end of job {number}", lambda: cluster.job(number).get("JobState") == "COMPLETED", 60)

    restarts = {number: int(cluster.job(number)["Restarts"]) for number in [coordinator, *tasks]}
    expected = {number: (number in (coordinator, limited)) + (number in (coordinator, *lost_workers)) for number in restarts}
    need(restarts == expected, f"restarts {restarts}, not {expected}")
    for task in stay:
        followed = re.findall(r"working for (\S+)", (run / f"worker-{task.split('_')[1]}.log").read_text())
        need(len(set(followed)) >= 2, f"worker {task} was never restarted but worked for {followed}, not for two addresses")

    verified = json.loads(elbo(program, "verify", out, "--json"))
    need(verified["ok"] and verified["predictions"] == 360, f"verify: {verified}")
    alone, together = predictions(work / "alone"), predictions(out)
    need(len(alone) == SHARDS and alone == together, "the predictions differ from an undisturbed run's")
    say("the bytes are the same as without Slurm and without a lost node")


def main():
    need(len(sys.argv) == 2, f"usage: {sys.argv[0]} ELBO")
    program = Path(sys.argv[1]).resolve()
    need(os.access(program, os.X_OK), f"{program} is not a program: build it with cargo build --release")
    need(os.geteuid() == 0, "slurmd starts jobs as their owners: run this as root")
    install()
    adopt()
    # Stopping this test also stops the cluster.
    for number in [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    home = Path(tempfile.mkdtemp(prefix="elbo-slurm-"))
    home.chmod(0o755)
    work = home / "work"
    work.mkdir()
    cluster = Cluster(home)
    began, passed = time.monotonic(), False
    try:
        cluster.start()
        test(program, cluster, work)
        passed = True
    finally:
        if not passed:
            for log in [*home.glob("*.log"), *(home / "work/run").glob("*.log")]:
                print(f"== {log.name}", "\n".join(log.read_text(errors="replace").splitlines()[-40:]), sep="\n", file=sys.stderr)
            print(cluster.ask("squeue", "--states=all"), file=sys.stderr)
        cluster.stop()
        shutil.rmtree(home, ignore_errors=True)
    say(f"passed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        print(f"slurm: FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
