#!/usr/bin/env python3
"""Whole jobs on an emulated GPU, compared with the same jobs on the processor.

    tests/cuda/job.py ELBO LIBRARIES

ELBO is built with the feature cuda; LIBRARIES is the output of tests/cuda/driver/build.sh. Labels three digits in every type; with a
loss that is computed on the host; with so little memory that batches have to be halved, which must not change a bit; with a cuDNN
that does not start, refuses convolutions or lacks memory; and on a device that refuses a launch or is lost.
`tests/cuda/emulated.sh jobs` does all of this.
"""
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Largest relative difference of an image's errors, by type: f32 differs by the order of sums, the others by every rounding.
TOLERANCES = {"f32": 2e-5, "f16": 5e-3, "bf16": 3e-2}
# Exit code of a job whose only device is lost.
LOST = 1


def main():
    elbo, libraries = (Path(path).resolve() for path in sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for digit in ["zero", "four", "seven"]:
            image = min((ROOT / "cli/demo/images" / digit).iterdir())
            (scratch / "images" / digit).mkdir(parents=True)
            shutil.copy(image, scratch / "images" / digit)

        def label(name, *flags, code=0, **environment):
            environment = {"LD_LIBRARY_PATH": str(libraries), "ELBO_CACHE": str(scratch / "cache")} | environment
            out, table = scratch / name, scratch / f"{name}.csv"
            command = [elbo, "label", "--images", scratch / "images", "--keep", "2,1", "--samples", "2,4", "--progress", "none"]
            said = run([*command, "--label-from", "parent", "--out", out, *flags], environment, code)
            if code:
                return None, said
            run([elbo, "export", out, "--format", "csv", "--to", table], {})
            with table.open() as file:
                return list(csv.DictReader(file)), said

        unet = ["--model", ROOT / "cli/demo/model", "--classes", ROOT / "cli/demo/classes.csv"]
        dit = ["--model", ROOT / "tests/fixtures/digits-dit/model", "--loss", "l2+vlb"]
        for model, name in [(unet, "unet"), (dit, "dit")]:
            expected, _ = label(f"{name}-cpu", *model)
            for dtype, tolerance in TOLERANCES.items():
                found, _ = label(f"{name}-{dtype}", *model, "--device", "cuda", "--dtype", dtype, "--batch", "8")
                worst = compare(found, expected)
                print(f"{name}, {dtype}: largest relative difference of an error {worst:.1e}")
                assert worst < tolerance, f"{name}, {dtype}: {worst}"
        whole, _ = label("whole", *unet, "--device", "cuda:0", "--batch", "20")
        halved, said = label("halved", *unet, "--device", "cuda:0", "--batch", "20", ELBO_EMULATED_MEMORY="40000000")
        assert "did not fit into memory" in said, f"no batch was halved: {said}"
        assert halved == whole, "halved batches changed a result"
        print("halved batches: the same bits")

        expected, _ = label("expected", *unet)
        half = [*unet, "--device", "cuda", "--dtype", "bf16", "--batch", "8"]
        for fault, sign in [("fails", "cuDNN does not start"), ("no-fused", "bias and residual are added afterwards"),
                            ("no-convolutions", "computed over patches"), ("breaks", "computed over patches"),
                            ("no-memory", "did not fit into memory")]:
            found, said = label(f"cudnn-{fault}", *half, ELBO_EMULATED_CUDNN=fault)
            assert sign in said, f"{fault}: {said}"
            worst = compare(found, expected)
            print(f"cuDNN {fault}: largest relative difference of an error {worst:.1e}")
            assert worst < TOLERANCES["bf16"], f"{fault}: {worst}"

        single = [*unet, "--device", "cuda", "--dtype", "bf16", "--batch", "1"]
        _, said = label("no-room", *single, code=LOST, ELBO_EMULATED_CUDNN="no-memory")
        assert "smaller --batch" in said and "quarantine" not in said, said
        found, _ = label("no-room", *single)
        assert compare(found, expected) < TOLERANCES["bf16"], "running out of memory changed a result"
        print("no memory for one evaluation: the job stops, blames no image and resumes")

        device = [*unet, "--device", "cuda:0", "--batch", "20"]
        refused, said = label("refused", *device, ELBO_EMULATED_FAULT="stale@300")
        assert "block failed" in said, f"no launch was refused: {said}"
        assert refused == whole, "a refused launch changed a result"
        print("a refused launch: the same bits, by the same device")
        _, said = label("lost", *device, code=LOST, ELBO_EMULATED_FAULT="lost@300")
        assert "ILLEGAL_ADDRESS" in said and "panicked" not in said, said
        resumed, _ = label("lost", *device)
        assert resumed == whole, "a lost device changed a result"
        print("a lost device: the job stops and resumes to the same bits")
        _, said = label("small", *device, code=1, ELBO_EMULATED_MEMORY="20000000")
        assert "no room for the model" in said and "--dtype bf16" in said, said
        _, said = label("none", *device, code=2, CUDA_VISIBLE_DEVICES="")
        assert "CUDA_VISIBLE_DEVICES='' hides all others" in said, said


def run(command, environment, code=0):
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == code, f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr}"
    return done.stderr


def compare(found, expected):
    """The largest relative difference of the errors, image by image and rank by rank; predictions must agree."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["key"] == theirs["key"] and ours["predicted_class"] == theirs["predicted_class"], (ours, theirs)
        for column in [c for c in theirs if c.startswith("error_") and theirs[c]]:
            worst = max(worst, abs(float(ours[column]) / float(theirs[column]) - 1))
    return worst


if __name__ == "__main__":
    main()
