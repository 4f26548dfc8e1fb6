"""Forward passes of only the denoising network in PyTorch + diffusers: the peer that `elbo bench engine` compares with.

    python tests/peer/engine.py --model sd15 --batch 1,8,32 --dtype bf16 --device cuda

Weights are random, so a configuration is enough: bench/configs/NAME.json is a published model's unet/ or
transformer/config.json, `digits` is the demo's, and a diffusers model directory has its own. Every memory format, mode and
batch is measured separately: first compiling, autotuning and warming up, then as many passes as take --seconds, --rounds
times. On the CPU `max-autotune` is the same as `compile`. Prints one JSON object; --out also writes it to a file, rewritten
after every measurement. evaluations_per_second is that of the best round, where an evaluation is one latent through the
network once; `best` is the fastest result. memory_bytes is the peak while measuring, including weights: of tensors on cuda, of
the whole process on the CPU. Failed measurements are under `failures`, with their `error`.
"""
import argparse
import inspect
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

os.environ["USE_FLAX"] = "0"  # otherwise diffusers 0.36 also imports Flax's networks if Flax and JAX are installed

import diffusers
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

PUBLISHED = ["sd15", "sd2-base", "sdxl", "sd3-m", "dit-xl-2"]
NETWORKS = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "SD3Transformer2DModel": SD3Transformer2DModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
    "Transformer2DModel": DiTTransformer2DModel,  # the name in DiT's published configuration
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MODES = ["eager", "compile", "max-autotune"]
CLIP_TOKENS, T5_TOKENS = 77, 256
PROCESS = Path("/proc/self")


def arguments():
    integers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME|DIR", help=f"{', '.join(PUBLISHED)}, digits or a directory")
    parser.add_argument("--weights", action="store_true", help="read the directory's weights instead of drawing them")
    parser.add_argument("--batch", type=integers, default=[1], metavar="N[,N..]", help="latents in a pass")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int)
    modes = lambda text: text.split(",")
    parser.add_argument("--modes", type=modes, default=MODES[:2], metavar="MODE[,..]", help=f"of {', '.join(MODES)}")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: both for a UNet, else no")
    parser.add_argument("--fuse-qkv", action="store_true", help="one product for queries, keys and values, if diffusers has it")
    parser.add_argument("--tf32", action="store_true", help="TF32 in f32's products and convolutions on cuda")
    parser.add_argument("--latent", type=int, metavar="SIDE", help="default: the configuration's sample_size")
    parser.add_argument("--tokens", type=int, help="tokens of a prompt; default: 77, for SD3 the pipeline's 77 + 256 of T5")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per noisy latent; here each is computed in full")
    parser.add_argument("--seconds", type=float, default=2, help="least time of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the result, rewritten after every measurement")
    args = parser.parse_args()
    if not set(args.modes) <= set(MODES):
        parser.error(f"--modes are {', '.join(MODES)}")
    if args.weights and args.model in PUBLISHED:
        parser.error("--weights needs a model directory")
    if args.rounds < 1 or min(args.batch) < 1:
        parser.error("--rounds and --batch are at least 1")
    return args


def root():
    """The repository. A function, since elbo passes this program to Python on standard input, where it has no path."""
    return Path(__file__).resolve().parents[2]


def config_file(model):
    """The network's configuration: a published model's, the demo's or a directory's."""
    if model in PUBLISHED:
        return root() / "bench/configs" / f"{model}.json"
    directory = root() / "cli/demo/model" if model == "digits" else Path(model)
    files = [directory / network / "config.json" for network in ("unet", "transformer")]
    for file in files:
        if file.is_file():
            return file
    sys.exit(f"{model} is neither one of {', '.join(PUBLISHED)}, digits nor a directory with unet/ or transformer/config.json")


def load(args):
    """The network on its device, in evaluation mode."""
    file = config_file(args.model)
    config = json.loads(file.read_text())
    network = NETWORKS.get(config["_class_name"])
    if network is None:
        sys.exit(f"{file}: {config['_class_name']} is none of {', '.join(NETWORKS)}")
    torch.manual_seed(0)
    if args.weights:
        net = network.from_pretrained(file.parent)
    else:
        # Otherwise diffusers warns of every setting of Transformer2DModel that a DiT does not use.
        known = inspect.signature(network.__init__).parameters
        with torch.device(args.device):
            net = network.from_config({key: value for key, value in config.items() if key in known})
    return net.to(args.device, DTYPES[args.dtype]).eval()


def inputs(net, batch, args):
    """Random latents [B, C, H, W], a timestep for each, and their conditions as the pipelines give them."""
    config, side = net.config, args.latent or net.config.sample_size
    drawn = lambda *shape: torch.randn(batch, *shape, device=args.device, dtype=DTYPES[args.dtype])
    below = lambda end: torch.randint(end, (batch,), device=args.device)
    latents, timesteps = drawn(config.in_channels, side, side), below(1000)
    if isinstance(net, DiTTransformer2DModel):
        return latents, {"timestep": timesteps, "class_labels": below(config.num_embeds_ada_norm)}
    if isinstance(net, SD3Transformer2DModel):
        tokens = drawn(args.tokens or CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim)
        pooled = drawn(config.pooled_projection_dim)
        return latents, {"timestep": timesteps.float(), "encoder_hidden_states": tokens, "pooled_projections": pooled}
    condition = {"timestep": timesteps, "encoder_hidden_states": drawn(args.tokens or CLIP_TOKENS, config.cross_attention_dim)}
    if config.time_cond_proj_dim is not None:
        condition["timestep_cond"] = drawn(config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        sizes = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], device=args.device, dtype=DTYPES[args.dtype])
        pooled = drawn(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        condition["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.repeat(batch, 1)}
    return latents, condition


def seconds_of(passes, forward, device):
    """The time that this many passes take."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(passes):
            forward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    for _ in range(passes):
        forward()
    return time.perf_counter() - started


def reset_peak_memory(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")


def peak_memory(device):
    """Bytes, or None if the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if (PROCESS / "status").exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", (PROCESS / "status").read_text())[1])


@torch.inference_mode()
def measure(net, mode, memory_format, batch, args):
    """The time and memory of passes over this many latents."""
    latents, condition = inputs(net, batch, args)
    latents = latents.to(memory_format=memory_format)
    autotune = "max-autotune" if mode == "max-autotune" and args.device == "cuda" else None
    module = net if mode == "eager" else torch.compile(net, dynamic=False, mode=autotune)
    forward = lambda: module(latents, **condition, return_dict=False)[0]
    if not forward().isfinite().all():
        print(f"{args.model}: not all outputs are finite in {args.dtype}", file=sys.stderr)
    reset_peak_memory(args.device)
    passes, rounds = 1, []
    while not rounds:
        taken = seconds_of(passes, forward, args.device)
        if taken >= args.seconds:
            rounds.append(taken)
        else:
            passes = math.ceil(passes * min(10, 1.1 * args.seconds / taken))
    rounds += [seconds_of(passes, forward, args.device) for _ in range(args.rounds - 1)]
    rate = lambda seconds: batch * passes / seconds
    return {
        "evaluations_per_second": rate(min(rounds)),
        "median_evaluations_per_second": rate(statistics.median(rounds)),
        "milliseconds_per_evaluation": 1000 / rate(min(rounds)),
        "passes": passes,
        "memory_bytes": peak_memory(args.device),
    }


def attempt(net, mode, memory_format, batch, args):
    """The measurement, or the error."""
    try:
        return measure(net, mode, memory_format, batch, args)
    except Exception as error:  # out of memory, no compiler, an operator without a kernel
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def run(net, args):
    """A result or an error for every memory format, mode and batch."""
    both = [False, True] if isinstance(net, UNet2DConditionModel) else [False]
    for channels_last in both if args.channels_last is None else [args.channels_last]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        net.to(memory_format=memory_format)
        for mode in args.modes:
            for batch in args.batch:
                torch.compiler.reset()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
                way = {"model": args.model, "mode": mode, "channels_last": channels_last, "dtype": args.dtype, "batch": batch}
                result = way | attempt(net, mode, memory_format, batch, args)
                print(json.dumps(result), file=sys.stderr, flush=True)
                yield result


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor()


def libraries(device):
    """Paths of the loaded cuDNN and cuBLAS; none on the CPU, where PyTorch may load them but does not use them."""
    if device == "cpu" or not (PROCESS / "maps").exists():
        return []
    return sorted(set(re.findall(r"/\S*/lib(?:cudnn|cublas)[^/\s]*\.so\S*", (PROCESS / "maps").read_text())))


def report(facts, results, args):
    """The JSON text of the report with these results."""
    measured = [result for result in results if "error" not in result]
    return json.dumps(facts | {
        "libraries": libraries(args.device),
        "results": measured,
        "failures": [result for result in results if "error" in result],
        "best": max(measured, key=lambda result: result["evaluations_per_second"], default=None),
    })


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True
    net = load(args)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    fused = args.fuse_qkv and hasattr(net, "fuse_qkv_projections")
    if fused:
        net.fuse_qkv_projections()  # adds fused weights to the separate ones
    facts = {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "latent": args.latent or net.config.sample_size,
        "fuse_qkv": fused,
        "tf32": args.tf32,
    }
    results = []
    for result in run(net, args):
        results.append(result)
        if args.out:
            temporary = args.out.with_name(f"{args.out.name}.tmp")
            temporary.write_text(report(facts, results, args))
            temporary.replace(args.out)  # atomic: a killed run leaves no partial file
    print(report(facts, results, args))
    if all("error" in result for result in results):
        sys.exit("nothing could be measured")


if __name__ == "__main__":
    main()
