"""Checks what only a real GPU can show; deploy/cuda/sanitize.sh says how to call it."""
import shlex
import sys
import time

import machine
from steps import ROOT, table


class Checks:
    def __init__(self, run, machine_):
        self.run, self.machine = run, machine_
        self.facts, self.layers, self.large = [], [], []
        run.report = self.report

    def check(self):
        self.facts = self.machine.begin(self.run)
        self.run.refresh()
        tiny = self.machine.tiny
        for tool in ["memcheck", "racecheck"]:
            command = self.machine.sanitized(tool, self.run.scratch / tool)
            self.run.step(f"{tool}: digits in bf16", command, 300 if tiny else 75, self.machine.of_tools)
        dtypes = ["bf16"] if tiny else ["bf16", "f16"]
        for dtype in dtypes:
            self.full_size(dtype)
        if not tiny:
            self.values_beyond_32_bits()

    def full_size(self, dtype):
        """Layers of full size: PyTorch draws and computes them, and this program computes them again."""
        made = self.run.scratch / f"layers-{dtype}"
        script = ROOT / "deploy/cuda/measure/layers.py"
        shrink = ["--batch", "1", "--shrink", "16"] if self.machine.tiny else []
        program = [script, "make", made, "--device", self.machine.torch_device, "--dtype", dtype, *shrink]
        if not self.machine.in_torch(self.run, f"PyTorch: layers in {dtype}", program, 60).ok:
            return
        test = [self.machine.parity, "layers_of_full_size", "--ignored", "--nocapture"]
        environment = self.machine.environment | {"ELBO_LAYERS": str(made)}
        compared = lambda step: [line.split("\t")[1:] for line in step.output.splitlines() if line.startswith("layer\t")]
        step = self.run.step(f"elbo: layers in {dtype}", test, 120, environment, compared)
        self.layers += [[dtype, name, ours, theirs] for name, ours, theirs in compared(step)]
        self.run.refresh()

    def values_beyond_32_bits(self):
        test = [self.machine.parity, "batches_of_more_values", "--ignored", "--nocapture"]
        compared = lambda step: [line.split("\t")[1:] for line in step.output.splitlines() if line.startswith("large\t")]
        step = self.run.step("elbo: more values than 32 bits count", test, 60, self.machine.environment, compared)
        self.large = compared(step)
        self.run.refresh()

    def report(self):
        """Writes the findings so far."""
        sections = [
            ("Machine", table(["", ""], self.facts)),
            ("Warnings", machine.warnings(self.run)),
            ("Layers of full size: relative error of the output beside PyTorch in f32", self.layers and table(
                ["type", "layer", "elbo", "PyTorch in that type"], self.layers)),
            ("Batches of more values than 32 bits count: difference of the last image from that image alone", self.large and table(
                ["operation", "values", "difference"], self.large)),
            ("Steps", machine.steps_table(self.run)),
        ]
        text = f"## {machine.title(self.facts, self.machine.device)}, {time.strftime('%Y-%m-%d')}\n\n    deploy/cuda/sanitize.sh {shlex.join(sys.argv[1:])}\n"
        text += "".join(f"\n### {name}\n\n{content}" for name, content in sections if content)
        (self.run.out / "report.md").write_text(text)


def work(run, machine_):
    Checks(run, machine_).check()


if __name__ == "__main__":
    sys.exit(machine.main(__doc__, 240, "sanitized", work))
