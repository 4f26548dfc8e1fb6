#!/usr/bin/env python3
"""Runs deploy/cuda/measure.sh and sanitize.sh on the emulated device, in a directory with only the files the GPU machine would get.

    tests/cuda/rehearse.py CARRY WHEELS LIBRARIES PYTHON

CARRY and WHEELS are outputs of deploy/cuda/build.sh, LIBRARIES is the output of tests/cuda/driver/build.sh. PYTHON has the same
PyTorch as the machine to measure, and transformers, but no diffusers. Networks and layers are small, PyTorch computes on the
processor, and programs in tests/cuda/tools replace ncu, compute-sanitizer and nvidia-smi. `tests/cuda/emulated.sh measure` does
all of this.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The output must be easy to bring back: limits on the number of files and the bytes per file.
MOST_FILES, MOST_BYTES = 8, 16 << 20


def main():
    carry, wheels, libraries = (Path(path).resolve() for path in sys.argv[1:4])
    python = Path(sys.argv[4]).absolute()  # not resolved: a link in a virtual environment must stay a link
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        (copy / "target/cuda").mkdir(parents=True)
        shutil.copy(carry, copy / "target/cuda/carry.tar.xz")
        shutil.copytree(wheels, copy / "target/cuda/wheels")
        environment = os.environ | {"PATH": f"{ROOT / 'tests/cuda/tools'}:{os.environ['PATH']}", "PYTHON": str(python)}
        for script, expected in [
            ("measure", ["digits labelled", "| eager | compile | max-autotune | elbo |", "attention_d", "a convolution", "a matrix product",
                         "compute | memory | DRAM", "libcublasLt", "conv2d", "group-norm", "copy"]),
            ("sanitize", ["memcheck", "racecheck", "conv2d", "self_attention", "elbo | PyTorch in that type"]),
        ]:
            out, started = Path(scratch) / script, time.monotonic()
            command = [copy / f"deploy/cuda/{script}.sh", "--tiny", "--libraries", libraries, "--torch-device", "cpu", "--seconds", "1800"]
            done = subprocess.run(command, cwd=scratch, env=environment | {"OUT": str(out)}, capture_output=True, text=True)
            report = (out / "report.md").read_text()
            missing = [text for text in expected if text.lower() not in report.lower()]
            assert done.returncode == 0 and not missing, f"{missing}\n{done.stdout}{done.stderr}\n{report}"
            files = list(out.rglob("*"))
            assert len(files) <= MOST_FILES and all(file.stat().st_size <= MOST_BYTES for file in files), files
            print(f"{script}.sh: all steps ok in {time.monotonic() - started:.0f} s")
            if "--show" in sys.argv:
                print(report)


if __name__ == "__main__":
    main()
