"""The common part of both scripts: their arguments, the programs to run, and a description of this machine."""
import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from steps import ROOT, Run, library_path, table, unpack

TORCH = """
import json, torch
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
}))
"""


# Directories of NVIDIA's tools if they are not on the path.
TOOLS = ["/usr/local/cuda/bin", *sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)]
# Kernels of cuBLASLt and cuDNN.
OF_LIBRARIES = "cublas|cudnn|cutlass|xmma|nvjet|gemm"


class Machine:
    """The programs, and how to call them: `elbo` and `parity` on `device`, `python` with PyTorch on `torch_device`."""

    def __init__(self, args, scratch):
        carry = unpack(args.carry, scratch)
        self.elbo, self.parity, self.device = carry / "elbo", carry / "parity", args.device
        self.python, self.torch_device = sys.executable, "cuda" if args.device.startswith("cuda") else "cpu"
        self.torch_device = args.torch_device or self.torch_device
        self.tiny = args.tiny
        self.site = scratch / "site"
        # Number the devices like nvidia-smi.
        common = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "TMPDIR": str(scratch), "PATH": os.pathsep.join([os.environ["PATH"], *TOOLS])}
        self.libraries = args.libraries or library_path(self.python, scratch)
        self.of_tools = common | {"ELBO_CACHE": str(scratch / "cache"), "ELBO_TEST_DEVICE": args.device, "ELBO_TEST_ROOT": str(ROOT)}
        self.environment = self.of_tools | {"LD_LIBRARY_PATH": self.libraries}
        # PyTorch brings its own libraries and counts its devices from 0.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        number = int(args.device.partition(":")[2] or 0)
        the_device = visible.split(",")[number : number + 1] if visible else [str(number)]
        self.of_python = common | {"PYTHONPATH": str(self.site), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1",
                                   "CUDA_VISIBLE_DEVICES": ",".join(the_device)}
        self.torch = None
        self.wheels = sorted(Path(args.wheels).glob("*.whl"))

    def begin(self, run):
        """Installs the wheels and describes the machine: rows of a table."""
        version = run.step("elbo --version", [self.elbo, "--version"], 5)
        if self.wheels:
            install = [self.python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
                       "--target", self.site, *self.wheels]
            run.step("wheels", install, 60)
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.current.sm,mig.mode.current,uuid"
        smi = run.step("nvidia-smi", ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 20,
                       accept=lambda step: step.output.strip())
        torch = self.torch = run.step("PyTorch", [self.python, "-c", TORCH], 60, self.of_python, lambda step: json.loads(step.output))
        rows = [["elbo", version.output.strip()], ["host", f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"]]
        if smi.ok:
            keys, *values = [line.split(", ") for line in smi.output.strip().splitlines()]
            for value in values:
                rows.append(["GPU", ", ".join(f"{k} {v}" for k, v in zip(keys, value))])
        if torch.ok:
            found = json.loads(torch.output)
            rows.append(["PyTorch", ", ".join(f"{key} {value}" for key, value in found.items())])
        # A short run opens all libraries and reports them.
        short = [self.elbo, "bench", "engine", "--model", "digits", "--device", self.device, "--dtype", "bf16", "--batch", "2",
                 "--seconds", "0.1", "--rounds", "1", "--no-peak", "--json"]
        opened = run.step("CUDA's libraries", short, 60, self.environment, lambda step: json.loads(step.output)["batches"])
        for library in json.loads(opened.output)["libraries"] if opened.ok else []:
            rows.append([library["name"], f"{library['version'] or ''} {library['path']}".strip()])
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            rows.append(["CUDA_VISIBLE_DEVICES", os.environ["CUDA_VISIBLE_DEVICES"]])
        return rows

    def in_torch(self, run, name, program, limit):
        """Runs a PyTorch program as a step, unless PyTorch is missing. A slow start of PyTorch does not count as missing."""
        if self.torch.outcome == "failed":
            return run.skip(name, f"{self.python} has no PyTorch")
        return run.step(name, [self.python, *program], limit, self.of_python)

    def under(self, tool, command):
        """A command under one of NVIDIA's tools; the tool itself does not get the program's libraries."""
        return [*tool, "env", f"LD_LIBRARY_PATH={self.libraries}", *command]

    def sanitized(self, tool, out):
        """The command that labels two digits in bf16 under one of compute-sanitizer's tools.

        Libraries ask the driver for functions that it may lack, which is not an error, and their kernels synchronise in ways
        that racecheck does not know.
        """
        job = [self.elbo, "label", "--images", ROOT / "cli/demo/images", "--model", ROOT / "cli/demo/model", "--classes",
               ROOT / "cli/demo/classes.csv", "--limit", "2", "--keep", "2,1", "--samples", "2,4", "--batch", "16", "--device",
               self.device, "--dtype", "bf16", "--progress", "none", "--out", out]
        of_tool = ["--report-api-errors", "no"] if tool == "memcheck" else ["--kernel-name-exclude", f"regex={OF_LIBRARIES}"]
        return self.under(["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", *of_tool], job)


def main(description, seconds, name, work):
    """Parses arguments and runs `work(run, machine)` in a scratch directory; exits with 0 if every step was ok."""
    target = ROOT / "target/cuda"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="the device, by elbo's name [default: cuda:0]")
    parser.add_argument("--carry", default=target / "carry.tar.xz", metavar="FILE|DIR", help="the programs elbo and parity")
    parser.add_argument("--wheels", default=target / "wheels", metavar="DIR", help="Python packages to install for the PyTorch scripts")
    parser.add_argument("--libraries", metavar="DIRS", help="directories of CUDA's libraries [default: PyTorch's]")
    parser.add_argument("--torch-device", metavar="NAME", help="PyTorch's device [default: that of --device]")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"time limit of the whole run [default: {seconds}]")
    parser.add_argument("--tiny", action="store_true", help="small networks and layers, to try the script itself")
    args = parser.parse_args()
    if not Path(args.carry).exists():
        parser.error(f"{args.carry} is missing: deploy/cuda/build.sh makes it")
    out = Path(os.environ.get("OUT") or target / name).resolve()
    scratch = Path(tempfile.mkdtemp(prefix="elbo-"))
    try:
        run = Run(out, scratch, args.seconds)
        work(run, Machine(args, scratch))
        outcomes = [step.outcome for step in run.steps]
        print(f"{outcomes.count('ok')} of {len(outcomes)} steps ok; the report is {out / 'report.md'}")
        return 0 if set(outcomes) == {"ok"} else 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def steps_table(run):
    """Every step with its outcome and time."""
    rows = [[step.name, step.outcome, round(step.seconds, 1), "" if step.ok else step.reason()] for step in run.steps]
    return table(["step", "outcome", "s", ""], rows)


def warnings(run, most=20):
    """The program's warnings, each once: a list in Markdown."""
    found = {line.split(" WARN ", 1)[1].strip() for step in run.steps for line in step.said.splitlines() if " WARN " in line}
    more = [f"... and {len(found) - most} more: see log.txt"] if len(found) > most else []
    return "".join(f"- {warning}\n" for warning in [*sorted(found)[:most], *more])


def title(facts, device):
    """The title of the report: the GPU's name."""
    gpu = next((value for key, value in facts if key == "GPU"), None)
    return gpu.split(", ")[0].removeprefix("name ") if gpu else device
