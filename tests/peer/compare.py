"""Runs elbo and the PyTorch + diffusers peer on the same digits, one after the other, and prints the ratio of their speeds.

    cargo build --release && python tests/peer/compare.py [--limit 100] [--rounds 2]

Both use the same images, noise file, schedule (keep 5 1, samples 20 100, l2: 600 evaluations an image) and cores. elbo's time
is that of the whole process, including model loading, ledger and Parquet; the peer's time starts after loading and warm-up.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL, IMAGES, CLASSES = (ROOT / "cli/demo" / name for name in ("model", "images", "classes.csv"))
NOISE = ROOT / "tests/fixtures/digits-sd/noise.safetensors"
SCHEDULE = ["--keep", "5,1", "--samples", "20,100", "--loss", "l2", "--noise", NOISE]


def elbo(limit):
    with tempfile.TemporaryDirectory() as out:
        started = time.time()
        subprocess.run(
            [ROOT / "target/release/elbo", "label", "--images", IMAGES, "--classes", CLASSES, "--model", MODEL, "--out", out,
             *SCHEDULE, "--limit", str(limit), "--progress", "none"],
            check=True, stdout=subprocess.DEVNULL,
        )
        return limit / (time.time() - started)


def peer(limit, *flags):
    command = [sys.executable, ROOT / "tests/peer/classify.py", "--model", MODEL, "--images", IMAGES, "--prompts", CLASSES,
               *SCHEDULE, "--limit", str(limit), "--threads", str(os.cpu_count()), *flags]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])["images_per_second"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="images")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, of which the best counts")
    args = parser.parse_args()
    programs = {"elbo": elbo, "eager": peer, "compiled": lambda limit: peer(limit, "--compile")}
    best = {name: max(run(args.limit) for _ in range(args.rounds)) for name, run in programs.items()}
    print(json.dumps({
        "images_per_second": {name: round(rate, 3) for name, rate in best.items()},
        "ratio_to_eager": round(best["elbo"] / best["eager"], 2),
        "ratio_to_compiled": round(best["elbo"] / best["compiled"], 2),
    }))


if __name__ == "__main__":
    main()
