#!/usr/bin/env python3
"""deploy/cuda/measure.sh and sanitize.sh from beginning to end on the emulated device, in a folder that holds only what travels.

    tests/cuda/rehearse.py CARRY WHEELS LIBRARIES PYTHON

CARRY and WHEELS are what deploy/cuda/build.sh leaves, LIBRARIES what tests/cuda/driver/build.sh leaves; PYTHON has the PyTorch of
the machine that is to be measured, and transformers, but no diffusers. Networks and layers are small, PyTorch computes on the
processor, and programs of tests/cuda/tools stand in for ncu, compute-sanitizer and nvidia-smi. `tests/cuda/emulated.sh measure`
does it all.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What is left must be easy to bring back: so many files of so many bytes.
MOST_FILES, MOST_BYTES = 8, 16 << 20


def main():
    carry, wheels, libraries = (Path(path).resolve() for path in sys.argv[1:4])
    python = Path(sys.argv[4]).absolute()  # a link in a virtual environment must stay one
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
