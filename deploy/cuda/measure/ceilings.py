"""Measures the chip's own libraries through PyTorch on the layers of Stable Diffusion 2-base: the ceilings for elbo's kernels.

    python deploy/cuda/measure/ceilings.py --dtype bf16 --device cuda --out ceilings.json

Latents are 64x64, and --batch of them are computed at once. A call is warmed up and then measured for --seconds; the result is
the median of its rounds. Inputs are random, and calls cycle through several sets of them, so that inputs come from memory and
not from the cache. On cuda a round is replayed as a graph, which removes the gaps between launches. A multiply-add counts as
two operations. A failed measurement has an `error`. Prints one JSON object; --out also writes it to a file, rewritten after
every measurement.
--shrink N divides batch, channels, heads, positions and sides, so that a rehearsal on the CPU takes seconds.
"""
import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
CONVOLUTIONS = [  # input channels, output channels, side
    (320, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8), (2560, 1280, 16), (1920, 640, 32), (960, 320, 64),
    (640, 320, 64), (320, 640, 32),
]
LEVELS = [(320, 4096), (640, 1024), (1280, 256)]  # channels and positions of the transformer blocks
SELF_ATTENTIONS = [(5, 64, 4096), (10, 64, 1024), (20, 64, 256), (20, 64, 64)]  # heads, channels of a head, positions
CROSS_ATTENTIONS = [(5, 64, 4096), (10, 64, 1024)]
TOKENS = 77
MATMUL_SIDE = 8192
COPIED_BYTES = 4 << 30
ROTATED_BYTES = 256 << 20  # several times the largest cache of today's GPUs
CALLS_OF_A_ROUND, MOST_ROUNDS = 10, 1000


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a measurement")
    parser.add_argument("--shrink", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rewritten after every measurement")
    return parser.parse_args()


def shrunk(size, args, least=1):
    return max(least, size // args.shrink)


def drawn(*shape, args):
    """Random numbers of the measured type."""
    return torch.randn(shape, device=args.device, dtype=DTYPES[args.dtype])


def rotated(make, args):
    """Sets of tensors for a call, enough that the first is out of the cache once the last has been used."""
    first = make()
    size = sum(tensor.nbytes for tensor in first)
    sets = math.ceil(ROTATED_BYTES / size) if args.device == "cuda" else 1
    return [first] + [make() for _ in range(sets - 1)]


def timer(call, turns, args):
    """A function that makes the call with the tensors of every turn and returns the seconds it took."""
    if args.device == "cpu":
        def on_cpu():
            started = time.perf_counter()
            for tensors in turns:
                call(*tensors)
            return time.perf_counter() - started

        return on_cpu
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in turns:
            call(*tensors)

    def on_cuda():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return on_cuda


@torch.inference_mode()
def seconds_of(call, make, args):
    """The median time of one call, in seconds."""
    sets = rotated(make, args)
    for tensors in sets:
        call(*tensors)
    turns = sets * (math.ceil(CALLS_OF_A_ROUND / len(sets)) if args.device == "cuda" else 1)
    timed = timer(call, turns, args)
    timed()
    rounds = min(MOST_ROUNDS, max(3, math.ceil(args.seconds / timed())))
    return statistics.median(timed() for _ in range(rounds)) / len(turns)


def attempt(call, make, args, operations=None, moved=None):
    """The time of one call and its rate, or the error."""
    try:
        seconds = seconds_of(call, make, args)
    except Exception as error:  # no kernel for this shape, out of memory
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    finally:
        if args.device == "cuda":
            torch.cuda.empty_cache()
    rate = {"gigabytes_per_second": moved / seconds / 1e9} if moved else {"tflops": operations / seconds / 1e12}
    return {"milliseconds": 1000 * seconds} | rate


def convolutions(args):
    """3x3 convolutions of channels-last images, without a bias, since PyTorch adds it in a separate pass."""
    library = "cudnn" if args.device == "cuda" else "cpu"
    batch = shrunk(args.batch, args)
    for full_inputs, full_outputs, full_side in CONVOLUTIONS:
        inputs, outputs, side = shrunk(full_inputs, args, 8), shrunk(full_outputs, args, 8), shrunk(full_side, args, 4)
        make = lambda: [
            drawn(batch, inputs, side, side, args=args).to(memory_format=torch.channels_last),
            drawn(outputs, inputs, 3, 3, args=args).to(memory_format=torch.channels_last),
        ]
        operations = 2 * 9 * batch * side * side * inputs * outputs
        measured = attempt(lambda x, weight: F.conv2d(x, weight, padding=1), make, args, operations)
        yield {"kind": "conv", "shape": f"{batch}x{side}x{side}, {inputs} to {outputs}", "backend": library} | measured


def linears(args):
    """The linear layers of attention (queries, keys and values at once; the output) and both of GEGLU, with their biases."""
    library = "cublas" if args.device == "cuda" else "cpu"
    for full_channels, positions in LEVELS:
        channels, rows = shrunk(full_channels, args, 8), shrunk(args.batch, args) * shrunk(positions, args)
        for inputs, outputs in [(channels, 3 * channels), (channels, channels), (channels, 8 * channels), (4 * channels, channels)]:
            make = lambda: [drawn(*shape, args=args) for shape in [(rows, inputs), (outputs, inputs), (outputs,)]]
            measured = attempt(F.linear, make, args, 2 * rows * inputs * outputs)
            yield {"kind": "linear", "shape": f"{rows} rows, {inputs} to {outputs}", "backend": library} | measured


def attentions(args):
    """Self-attention, then cross-attention to a prompt, with every backend; on the CPU with the first that works."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION if args.device == "cuda" else SDPBackend.MATH]
    cases = [(*case, None) for case in SELF_ATTENTIONS] + [(*case, TOKENS) for case in CROSS_ATTENTIONS]
    batch = shrunk(args.batch, args)
    for full_heads, size, full_positions, tokens in cases:
        heads, positions = shrunk(full_heads, args), shrunk(full_positions, args)
        keys = tokens or positions
        # [B, L, heads, d] in memory, the layout of the linear layers before and after.
        make = lambda: [drawn(batch, length, heads, size, args=args).transpose(1, 2) for length in (positions, keys, keys)]
        shape = f"{batch}x{heads} heads of {size}, {positions} to {keys}"
        for backend in backends:
            with sdpa_kernel(backend):
                operations = 4 * batch * heads * positions * keys * size
                measured = attempt(F.scaled_dot_product_attention, make, args, operations)
            yield {"kind": "attention", "shape": shape, "backend": backend.name.lower()} | measured
            if args.device == "cpu" and "error" not in measured:
                break


def matmul(args):
    """One large product: the peak."""
    library = "cublas" if args.device == "cuda" else "cpu"
    side = shrunk(MATMUL_SIDE, args)
    make = lambda: [drawn(side, side, args=args) for _ in range(2)]
    yield {"kind": "matmul", "shape": f"{side}x{side}x{side}", "backend": library} | attempt(torch.mm, make, args, 2 * side**3)


def copy(args):
    """A copy within device memory; bytes read and bytes written both count."""
    size = COPIED_BYTES // args.shrink**3
    make = lambda: [torch.randint(256, (size,), device=args.device, dtype=torch.uint8) for _ in range(2)]
    measured = attempt(lambda to, source: to.copy_(source), make, args, moved=2 * size)
    yield {"kind": "copy", "shape": f"{size} bytes", "backend": args.device} | measured


def main():
    args = arguments()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 0  # every algorithm is tried
    report = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "batch": shrunk(args.batch, args),
        "dtype": args.dtype,
        "results": [],
    }
    for part in (matmul, copy, convolutions, linears, attentions):
        for result in part(args):
            report["results"].append(result)
            if args.out:
                temporary = args.out.with_name(f"{args.out.name}.tmp")
                temporary.write_text(json.dumps(report))
                temporary.replace(args.out)  # atomic: a killed run leaves no partial file
    print(json.dumps(report))


if __name__ == "__main__":
    main()
