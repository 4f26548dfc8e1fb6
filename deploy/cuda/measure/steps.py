"""Independent steps, each under its own time limit and that of the whole run. A step's output is saved when it ends.

A `Run` writes to the directory OUT: log.txt with all output of the steps, and the files that the steps write. Each command
runs in its own process group, which is killed when its time is up.
"""
import os
import signal
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Seconds kept for writing the report.
RESERVE = 5
# Prefixes of library names: those that the program opens, and those that they open.
LIBRARIES = ("libcublas", "libcurand", "libcudnn", "libnvrtc", "libnvJitLink")
# Seconds between asking a command to end and killing it.
GRACE = 3


@dataclass
class Step:
    """A step and its outcome: ok, failed, timeout or skipped."""
    name: str
    outcome: str
    seconds: float = 0.0
    said: str = ""
    output: str = ""
    command: list = field(default_factory=list)

    @property
    def ok(self):
        return self.outcome == "ok"

    def reason(self):
        """The line that best explains why the step is not ok."""
        lines = [line.strip() for line in f"{self.output}\n{self.said}".splitlines() if line.strip()]
        failed = [line for line in lines if line.startswith("test ") and line.endswith("FAILED")]
        if failed:
            return ", ".join(line.split()[1] for line in failed)[:300]
        telling = [line for line in lines if "error" in line.lower() and not line.startswith("note:")]
        return (telling or lines or [""])[-1][:300]


class Run:
    def __init__(self, out, scratch, seconds):
        """A run of at most `seconds` that writes its files to the directory `out` and works in the directory `scratch`."""
        self.out, self.scratch = Path(out), Path(scratch)
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + seconds - RESERVE
        self.steps = []
        self.report = lambda: None
        (self.out / "log.txt").write_text("")

    def left(self):
        return self.deadline - time.monotonic()

    def step(self, name, command, limit, environment=None, accept=lambda step: True):
        """Runs a command for `limit` seconds at most; the step is ok if it ends with 0 and `accept(step)` is true.

        Standard output becomes the step's `output`, standard error becomes `said`.
        """
        command = [str(part) for part in command]
        limit = min(limit, self.left())
        if limit < 1:
            return self.skip(name, "no time was left")
        started = time.monotonic()
        output, said = self.scratch / "output", self.scratch / "said"
        with output.open("wb") as to_output, said.open("wb") as to_said:
            try:
                process = subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL,
                                           stdout=to_output, stderr=to_said, start_new_session=True)
            except OSError as error:
                return self._end(Step(name, "failed", said=f"{command[0]}: {error.strerror}", command=command))
            try:
                outcome = "ok" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "timeout"
            finally:
                _end_group(process)
        read = lambda path: path.read_text(errors="replace")
        step = Step(name, outcome, time.monotonic() - started, read(said), read(output), command)
        try:
            if step.ok and not accept(step):
                step.outcome, step.said = "failed", f"{step.said}\nerror: what it found is not right"
        except Exception as error:  # whatever went wrong, only this step fails
            step.outcome, step.said = "failed", f"{step.said}\nerror: its output makes no sense: {error!r}"
        return self._end(step)

    def skip(self, name, reason):
        """Records a step that is not run."""
        return self._end(Step(name, "skipped", said=reason))

    def _end(self, step):
        self.steps.append(step)
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n== {step.name}: {step.outcome}, {step.seconds:.1f} s\n$ {' '.join(step.command)}\n{step.said}{step.output}")
        print(f"{step.name}: {step.outcome}, {step.seconds:.1f} s{'' if step.ok else f': {step.reason()}'}", flush=True)
        self.refresh()
        return step

    def refresh(self):
        """Rewrites the report. If that fails, the error goes to the log and no step fails."""
        try:
            self.report()
        except Exception as error:
            with (self.out / "log.txt").open("a") as log:
                log.write(f"\nthe report could not be written: {error!r}\n")
            print(f"the report could not be written: {error!r}", flush=True)


def _end_group(process):
    """Ends a command and all processes that it left running."""
    for number, patience in [(signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)]:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        end = time.monotonic() + patience
        while time.monotonic() < end and _group_lives(process):
            time.sleep(0.05)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass  # a process can't be killed while its driver hangs: the next step begins anyway


def _group_lives(process):
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def unpack(carry, scratch):
    """The directory with the programs `elbo` and `parity`: `carry` itself, or its content if it is an archive."""
    carry = Path(carry)
    if carry.is_dir():
        return carry.resolve()
    with tarfile.open(carry) as archive:
        archive.extractall(scratch / "carry", filter="data")
    return scratch / "carry"


def library_path(python, scratch):
    """A directory with the CUDA libraries that come with PyTorch, for LD_LIBRARY_PATH.

    Programs first ask for names without a version, which PyTorch's libraries lack: a toolkit's would be taken instead, and
    parts of two versions mixed. So the libraries get such names. Other files beside them are left out: tools like ncu bring
    their own.
    """
    script = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip())
    names = scratch / "libraries"
    names.mkdir()
    for library in [library for folder in ("cu13", "cudnn") for library in (site / "nvidia" / folder / "lib").glob("lib*.so.*")]:
        if library.name.startswith(LIBRARIES):
            for name in (library.name, f"{library.name.split('.so.')[0]}.so"):
                (names / name).symlink_to(library)
    before = os.environ.get("LD_LIBRARY_PATH")
    return f"{names}:{before}" if before else str(names)


def table(header, rows, align=None):
    """A Markdown table; columns whose first row is a number are aligned to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [bool(rows) and isinstance(rows[0][i], (int, float)) for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if number else "---" for number in (align or right)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]) + "\n"


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
