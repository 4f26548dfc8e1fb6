"""Images per second on one core: elbo, Pillow and torchvision on the same files in the same run.

    pip install numpy pillow torch torchvision && python tests/peer/decode.py [--seconds 2] [--python OTHER/bin/python]

Files are artificial photographs with texture and sharp edges, JPEG of quality 88: 500x375, 640x480 and 1024x768, 12 megapixels
(like a phone's: also rotated by EXIF, and progressive) and a PNG. `decode` ends with pixels in memory, `to 512` with the
floats of a 512x512 crop. Times are processor times, the best of several repetitions, so that a busy machine matters little.
elbo runs its own benchmark (worker/images/benches/decode.rs) twice with different numbers of calls: the difference is the time
of the calls alone. `--python` also times a Pillow in another environment, such as Pillow-SIMD.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_files(directory):
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests/fixtures/preprocess"))
    from real_shaped import photograph

    rng = np.random.default_rng(0)
    for width, height in [(500, 375), (640, 480), (1024, 768)]:
        photograph(rng, height, width).save(directory / f"{width}x{height}.jpg", quality=88)
    photograph(rng, 375, 500).save(directory / "500x375.png")
    large = photograph(rng, 3000, 4000)
    large.save(directory / "4000x3000.jpg", quality=88)
    large.save(directory / "4000x3000-progressive.jpg", quality=88, progressive=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(directory / "4000x3000-turned.jpg", quality=88, exif=exif)


def best(function, seconds):
    """Seconds of the fastest call."""
    fastest, end = float("inf"), time.process_time() + seconds
    while time.process_time() < end or fastest == float("inf"):
        start = time.process_time()
        function()
        fastest = min(fastest, time.process_time() - start)
    return fastest


def pillow(directory, seconds):
    """{file: {decode, to_512}} in seconds."""
    import io

    import numpy as np
    from PIL import Image, ImageOps

    def decode(data):
        image = Image.open(io.BytesIO(data))
        image.load()
        return image

    def to_512(data):
        # torchvision's Resize and CenterCrop of a PIL image, ToTensor and Normalize.
        image = ImageOps.exif_transpose(decode(data))
        width, height = image.size
        new = (512, int(512 * height / width)) if width <= height else (int(512 * width / height), 512)
        image = image.resize(new, Image.BICUBIC)
        left, top = round((new[0] - 512) / 2), round((new[1] - 512) / 2)
        image = image.crop((left, top, left + 512, top + 512)).convert("RGB")
        return (np.asarray(image, dtype=np.float32) / 255.0 - 0.5) / 0.5

    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    return {name: {"decode": best(lambda: decode(data), seconds), "to_512": best(lambda: to_512(data), seconds)} for name, data in files.items()}


def torchvision(directory, seconds):
    import torch
    from torchvision.io import ImageReadMode, decode_image, decode_jpeg
    from torchvision.transforms.v2 import CenterCrop, InterpolationMode, Resize

    torch.set_num_threads(1)
    resize, crop = Resize(512, InterpolationMode.BICUBIC, antialias=True), CenterCrop(512)

    def decode(name, data):
        if name.endswith(".jpg"):
            return decode_jpeg(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return decode_image(data, mode=ImageReadMode.RGB)

    def to_512(name, data):
        return (crop(resize(decode(name, data))).float() / 255.0 - 0.5) / 0.5

    result = {}
    for path in sorted(directory.iterdir()):
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        result[path.name] = {"decode": best(lambda: decode(path.name, data), seconds), "to_512": best(lambda: to_512(path.name, data), seconds)}
    return result


def elbo(directory, seconds):
    command = ["cargo", "bench", "--quiet", "-p", "elbo-images", "--bench", "decode", "--no-run", "--message-format", "json"]
    built = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    program = next(path for line in built.splitlines() if (path := json.loads(line).get("executable")))

    def used(benchmark, calls):
        """Seconds that a process with this many calls takes."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [program, "--bench", "--sample-count", str(calls), "--sample-size", "1", benchmark],
            env={**os.environ, "ELBO_BENCH_IMAGES": str(directory)}, check=True, capture_output=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    def call(benchmark):
        once = min(used(benchmark, 1) for _ in range(3))
        calls = 4
        while used(benchmark, calls) - once < seconds / 8:
            calls *= 2
        return (min(used(benchmark, calls) for _ in range(4)) - once) / (calls - 1)

    return {path.name: {what: call(f"{what}::{path.name}") for what in ["decode", "to_512"]} for path in sorted(directory.iterdir())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="seconds per measurement")
    parser.add_argument("--python", type=Path, help="a Python with another Pillow, measured too")
    parser.add_argument("--pillow-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pillow_only:
        print(json.dumps(pillow(args.pillow_only, args.seconds)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_files(directory)
        peers = {"elbo": elbo, "Pillow": pillow, "torchvision": torchvision}
        if args.python:
            command = [args.python, __file__, "--seconds", str(args.seconds), "--pillow-only", directory]
            peers["other Pillow"] = lambda *_: json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times = {name: run(directory, args.seconds) for name, run in peers.items()}
    for what in ["decode", "to_512"]:
        print(f"\n{what.replace('_', ' ')}, images/s".ljust(31), *(name.rjust(13) for name in times), "  elbo / Pillow", sep="")
        for file in times["elbo"]:
            rates = [1 / peer[file][what] for peer in times.values()]
            print(file.ljust(30), *(f"{rate:13.1f}" for rate in rates), f"{rates[0] / rates[1]:15.2f}", sep="")


if __name__ == "__main__":
    main()
