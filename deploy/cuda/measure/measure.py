"""Measures this program on this machine's GPU; deploy/cuda/measure.sh says how to call it."""
import json
import shlex
import sys
import time

import kernels
import machine
from steps import ROOT, table

# What is measured. The names are those of `elbo bench engine`.
FULL = {
    "main": "sd2-base", "batches": [8, 16, 32, 64], "prompts": 10, "batches_of_prompts": [20, 40, 80], "pass": 32,
    "others": [("dit-xl-2", 64), ("sd15", 32)], "seconds": 1, "accuracy": 0.97, "peak": [], "ceilings": ["--batch", "32"],
}
TINY = {
    "main": "digits", "batches": [2, 4], "prompts": 10, "batches_of_prompts": [10], "pass": 4,
    "others": [("digits", 4)], "seconds": 0.01, "accuracy": 0.7, "peak": ["--no-peak"],
    "ceilings": ["--batch", "2", "--shrink", "16", "--seconds", "0.01"],
}
MODES = ["eager", "compile", "max-autotune"]


class Measurements:
    """The steps, the most important first, and their findings."""

    def __init__(self, run, machine_, sizes):
        self.run, self.machine, self.sizes = run, machine_, sizes
        self.facts, self.engines, self.peers, self.profile = [], [], {}, {}
        self.right, self.launches, self.limits, self.ceilings = [], [], "", {}
        run.report = self.report

    def measure(self):
        self.facts = self.machine.begin(self.run)
        self.run.refresh()
        if self.smoke().outcome == "failed":
            tool = self.machine.sanitized("memcheck", self.run.scratch / "sanitized")
            self.run.step("compute-sanitizer", tool, 120, self.machine.of_tools)
            return
        self.parity()
        main = self.sizes["main"]
        self.engine(main, self.sizes["batches"], 1, 90, ["--profile", self.run.out / "trace.json", *self.sizes["peak"]])
        self.engine(main, self.sizes["batches_of_prompts"], self.sizes["prompts"], 60, ["--no-peak"])
        self.time_kernels()
        self.limit_kernels()
        self.torch_ceilings()
        for mode, limit in zip(MODES[:2], [60, 180]):
            self.peer(main, self.sizes["pass"], mode, limit)
        for model, batch in self.sizes["others"]:
            self.engine(model, [batch], 1, 45, ["--no-peak"])
        for model, batch in self.sizes["others"]:
            self.peer(model, batch, "compile", 90)
        self.peer(main, self.sizes["pass"], "max-autotune", self.run.left())

    def smoke(self):
        """Labels the digits, to check that the program works at all."""
        elbo, out, tiny = self.machine.elbo, self.run.scratch / "digits", self.machine.tiny
        # A small job on an emulated device; the demo's own job on a real one.
        some = ["--limit", "4", "--max-slots", "10", "--batch", "20"] if tiny else []
        job = [elbo, "label", "--images", ROOT / "cli/demo/images", "--model", ROOT / "cli/demo/model", "--classes",
               ROOT / "cli/demo/classes.csv", "--label-from", "parent", *some, "--device", self.machine.device, "--dtype", "bf16",
               "--progress", "none", "--out", out]
        script = f"{shlex.join(map(str, job))} >&2 && {shlex.join([str(elbo), 'report', str(out), '--json'])}"
        found = []

        def right(step):
            found.append(json.loads(step.output)["accuracy"]["top1"])
            return found[0] >= self.sizes["accuracy"]

        # The first job on a device also waits while its libraries are loaded.
        step = self.run.step("digits in bf16", ["bash", "-c", script], 300 if tiny else 120, self.machine.environment, right)
        if found:
            self.right.append(f"Digits labelled in bf16: {100 * found[0]:.2f} % right, {step.seconds:.1f} s.")
        return step

    def parity(self):
        tests = ["of_digits_sd", "--skip", "half", "--skip", "errors"] if self.machine.tiny else []
        command = [self.machine.parity, "--nocapture", "--test-threads", "4", *tests]
        step = self.run.step("parity: f32, f16, bf16", command, 600 if self.machine.tiny else 100, self.machine.environment)
        results = [line for line in step.output.splitlines() if line.startswith("test result:")]
        self.right.append(f"Every submodule and error beside PyTorch's in double precision: {results[-1] if results else step.outcome}")

    def engine(self, model, batches, prompts, limit, options):
        command = [self.machine.elbo, "bench", "engine", "--model", model, "--device", self.machine.device, "--dtype", "bf16",
                   "--batch", ",".join(map(str, batches)), "--prompts", prompts, "--seconds", self.sizes["seconds"], "--rounds", 2,
                   "--json", *options]
        name = f"elbo: {model}" + (f", {prompts} prompts" if prompts > 1 else "")
        step = self.run.step(name, command, limit, self.machine.environment, lambda step: json.loads(step.output)["batches"])
        if step.ok:
            found = json.loads(step.output)
            self.engines.append(found)
            if model == self.sizes["main"] and prompts == 1 and not self.profile:
                self.profile = found
        self.run.refresh()

    def capture(self, log, command, name, limit, accept):
        program = [self.machine.elbo, "bench", "engine", "--model", self.sizes["main"], "--device", self.machine.device, "--dtype",
                   "bf16", "--batch", self.sizes["pass"], "--capture"]
        return self.run.step(name, self.machine.under(command, program), limit, self.machine.of_tools, lambda step: accept(log))

    def time_kernels(self):
        log = self.run.out / "kernels.csv"
        step = self.capture(log, kernels.timing(log), "ncu: time of every kernel", 90, kernels.launches)
        if step.ok:
            self.launches = kernels.launches(log)
        self.run.refresh()

    def limit_kernels(self):
        if not self.launches:
            return
        log = self.run.out / "sections.csv"
        dearest = [name for name, _, _ in kernels.by_kernel(self.launches)[:5]]
        command = kernels.details(log, dearest, self.launches)
        step = self.capture(log, command, "ncu: what limits five kernels", 90, kernels.details_table)
        if step.ok:
            self.limits = kernels.details_table(log, dearest)
        self.run.refresh()

    def torch_ceilings(self):
        found = self.run.scratch / "ceilings.json"
        program = [ROOT / "deploy/cuda/measure/ceilings.py", "--dtype", "bf16", "--device",
                   self.machine.torch_device, "--out", found, *self.sizes["ceilings"]]
        self.machine.in_torch(self.run, "PyTorch: ceilings", program, 90)
        self.ceilings = json.loads(found.read_text()) if found.exists() else {}
        self.run.refresh()

    def peer(self, model, batch, mode, limit):
        found = self.run.scratch / "peer.json"
        found.unlink(missing_ok=True)
        program = [ROOT / "tests/peer/engine.py", "--model", model, "--batch", batch, "--dtype", "bf16",
                   "--device", self.machine.torch_device, "--modes", mode, "--seconds", self.sizes["seconds"], "--rounds", 2,
                   "--out", found, *(["--channels-last"] if not model.startswith("dit") else [])]
        self.machine.in_torch(self.run, f"PyTorch, {mode}: {model}", program, limit)
        results = json.loads(found.read_text())["results"] if found.exists() else []
        for result in results:
            self.peers[model, mode] = result
        self.run.refresh()

    def report(self):
        """Writes the findings so far."""
        engines, speed = self.engines, []
        for found in engines:
            for measured in found["batches"]:
                rate, peak = measured["evaluations_per_second"], engines[0]["peak_flops"]
                flops = rate * found["flops_per_evaluation"]
                speed.append([found["model"], found["prompts"], measured["batch"], rate, 1000 * measured["batch"] / rate, flops / 1e12,
                              f"{100 * flops / peak:.0f} %" if peak else None, round(measured["memory_bytes"] / 2**30, 1)])
        ratios = []
        for model in dict.fromkeys(model for model, _ in self.peers):
            of_model = {mode: result for (name, mode), result in self.peers.items() if name == model}
            rates = [of_model[mode]["evaluations_per_second"] if mode in of_model else None for mode in MODES]
            batch = next(iter(of_model.values()))["batch"]
            best = max(of_model, key=lambda mode: of_model[mode]["evaluations_per_second"])
            ours = [measured["evaluations_per_second"] for found in engines if found["model"] == model and found["prompts"] == 1
                    for measured in found["batches"] if measured["batch"] == batch]
            ratio = f"{max(ours) / of_model[best]['evaluations_per_second']:.2f} of {best}" if ours else None
            ratios.append([model, batch, *[rate or "not measured" for rate in rates], max(ours, default=None), ratio])
        parts = [[part["part"], f"{100 * part['share']:.1f} %", part["flops_per_second"] / 1e12 or None]
                 for part in self.profile.get("parts", [])]
        operations = [[row["milliseconds"], row["calls"], row["part"], row["name"]] for row in self.profile.get("operations", [])]
        profiled = f"of a pass over {self.profile.get('profiled_batch')}, {self.sizes['main']}, each operation waited for"
        ceilings = [[row["kind"], row["shape"], row.get("backend"), row.get("milliseconds"), row.get("tflops"),
                     row.get("gigabytes_per_second"), row.get("error")] for row in self.ceilings.get("results", [])]
        sections = [
            ("Machine", table(["", ""], self.facts)),
            ("Right?", "".join(f"- {line}\n" for line in self.right)),
            ("Warnings", machine.warnings(self.run)),
            ("Evaluations per second, bf16", speed and table(
                ["network", "prompts", "batch", "evaluations/s", "ms/batch", "TFLOP/s", "of products", "GiB"], speed)),
            ("Beside PyTorch at the same batch; UNets channels last", ratios and table(
                ["network", "batch", *MODES, "elbo", "ratio to the best"], ratios)),
            (f"Time by part {profiled}", parts and table(["part", "share", "TFLOP/s"], parts)),
            (f"Time by operation {profiled}", operations and table(["ms", "calls", "part", "operation"], operations)),
            (f"Kernels of a pass over {self.sizes['pass']}, {self.sizes['main']}, by ncu", self.launches and kernels.kernel_table(self.launches)),
            ("What limits the slowest kernels", self.limits),
            ("What PyTorch's libraries reach on the shapes of sd2-base", ceilings and table(
                ["", "shape", "backend", "ms", "TFLOP/s", "GB/s", ""], ceilings)),
            ("Steps", machine.steps_table(self.run)),
        ]
        text = f"## {machine.title(self.facts, self.machine.device)}, {time.strftime('%Y-%m-%d')}\n\n    deploy/cuda/measure.sh {shlex.join(sys.argv[1:])}\n"
        text += "".join(f"\n### {name}\n\n{content}" for name, content in sections if content)
        (self.run.out / "report.md").write_text(text)


def work(run, machine_):
    Measurements(run, machine_, TINY if machine_.tiny else FULL).measure()


if __name__ == "__main__":
    sys.exit(machine.main(__doc__, 560, "measured", work))
