"""Makes layers of the networks' sizes with PyTorch's outputs: the reference for elbo's kernels on a GPU.

    python deploy/cuda/measure/layers.py make DIR --device cuda --dtype bf16

writes DIR/layers.safetensors, whose tensors are named "<layer>.<tensor>", and DIR/layers.json, which lists the layers and their
parameters. Inputs and weights are drawn in f32, then rounded to --dtype and stored in it; `out` is computed from the rounded
values in f32 without TF32 and stored in f32. `peer_error` is |p - out| / |out|, where p is PyTorch's output in --dtype.

| op | tensors | out |
|---|---|---|
| conv2d | x [B, H, W, I], weight [O, I, 3, 3], bias [O] | [B, H', W', O]; one pixel of padding, `stride` |
| resnet_conv | x, norm_weight [I], norm_bias [I], weight, bias, shift [B, O], residual | conv(silu(norm(x))) + shift + residual |
| linear | x [B, L, I], weight [O, I], bias [O], maybe residual [B, L, O] | [B, L, O] |
| self_attention | qkv [B, L, 3 heads d], queries before keys before values | [B, L, heads d] |
| cross_attention | q [B, L, heads d], keys and values [B, 77, heads d] | [B, L, heads d] |
| group_norm | x [B, H, W, C], weight [C], bias [C] | the same; SiLU after it where `activate` is 1 |
| layer_norm | x [B, L, C], weight [C], bias [C] | the same |
| geglu_feed_forward | x [B, L, C], w1 [8C, C], b1 [8C], w2 [C, 4C], b2 [C] | h, g = split(x w1^T + b1); (h * gelu(g)) w2^T + b2 |

--shrink N divides channels, heads, positions and sides, so that a rehearsal on the CPU takes seconds; names keep the full sizes.
"""
import argparse
import json
import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
GROUPS, TOKENS = 32, 77
QUERIES_AT_ONCE = 1024

CONVOLUTIONS = [  # input channels, output channels, side, stride
    (320, 320, 64, 1), (2560, 1280, 8, 1), (2560, 1280, 16, 1), (1280, 1280, 16, 2), (4, 320, 64, 1), (320, 4, 64, 1),
]
RESNET_CONVOLUTIONS = [(960, 320, 64), (2560, 1280, 8)]  # input channels, output channels, side
LINEARS = [  # positions, inputs, outputs, with a residual
    (4096, 320, 2560, False), (4096, 1280, 320, True), (64, 1280, 10240, False), (77, 1024, 1280, False), (1, 1280, 1280, False),
]
SELF_ATTENTIONS = [(4096, 5, 64), (4096, 8, 40), (1024, 8, 80), (256, 16, 72), (64, 8, 160), (64, 20, 64)]  # positions, heads, d
CROSS_ATTENTIONS = [(4096, 5, 64), (1024, 8, 80)]
GROUP_NORMS = [(2560, 8, 1e-5, 1), (320, 64, 1e-6, 0), (960, 64, 1e-5, 1)]  # channels, side, eps, activate
LAYER_NORMS = [(4096, 320), (64, 1280), (256, 1152)]  # positions, channels
FEED_FORWARDS = [(4096, 320), (64, 1280)]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make"])
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--shrink", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Draw:
    """Draws tensors on the CPU, so that a seed gives the same tensors for every device."""

    def __init__(self, args):
        self.args, self.generator = args, torch.Generator().manual_seed(args.seed)

    def input(self, *shape):
        """Normal numbers [B, *shape]."""
        return torch.randn(self.args.batch, *shape, generator=self.generator)

    def weight(self, *shape):
        """Normal numbers divided by the square root of the number of terms in an output's sum."""
        return torch.randn(shape, generator=self.generator) / math.sqrt(math.prod(shape[1:]))

    def bias(self, size):
        return 0.1 * torch.randn(size, generator=self.generator)

    def scale(self, size):
        """A norm's weight."""
        return 1 + self.bias(size)

    def channels(self, full):
        """Fewer channels, still enough for 32 groups."""
        return full if full < GROUPS else max(GROUPS, full // self.args.shrink // GROUPS * GROUPS)

    def heads(self, full):
        return max(1, full // self.args.shrink)

    def positions(self, full):
        return min(full, max(16, full // self.args.shrink))

    def side(self, full):
        return max(4, full // self.args.shrink)


def conv2d(x, weight, bias, stride):
    """Convolves channels-last images [B, H, W, I], padded by one pixel."""
    images, weight = x.permute(0, 3, 1, 2), weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(images, weight, bias, stride=stride, padding=1).permute(0, 2, 3, 1)


def group_norm(x, weight, bias, groups, eps, activate):
    normal = F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)
    return F.silu(normal) if activate else normal


def resnet_conv(x, norm_weight, norm_bias, weight, bias, shift, residual, groups, eps):
    active = group_norm(x, norm_weight, norm_bias, groups, eps, activate=1)
    return conv2d(active, weight, bias, stride=1) + shift[:, None, None] + residual


def linear(x, weight, bias, residual=None):
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def attention(q, keys, values, heads):
    """Attention of q [B, L, heads d] to keys and values [B, K, heads d]: PyTorch's own, but in f32 by the softmax formula."""
    q, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, keys, values))
    if q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
    out = torch.empty_like(q)
    for image in range(q.shape[0]):
        for head in range(heads):
            for start in range(0, q.shape[2], QUERIES_AT_ONCE):
                queries = slice(start, start + QUERIES_AT_ONCE)
                scores = q[image, head, queries] @ keys[image, head].T / math.sqrt(q.shape[-1])
                out[image, head, queries] = scores.softmax(-1) @ values[image, head]
    return out.transpose(1, 2).flatten(2)


def self_attention(qkv, heads):
    return attention(*qkv.chunk(3, dim=-1), heads)


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def geglu_feed_forward(x, w1, b1, w2, b2):
    hidden, gate = F.linear(x, w1, b1).chunk(2, dim=-1)
    return F.linear(hidden * F.gelu(gate), w2, b2)


OPS = {
    "conv2d": conv2d,
    "resnet_conv": resnet_conv,
    "linear": linear,
    "self_attention": self_attention,
    "cross_attention": attention,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "geglu_feed_forward": geglu_feed_forward,
}


def layers(draw):
    """Every layer's op, full size, tensors in f32 and parameters."""
    for *full, stride in CONVOLUTIONS:
        inputs, outputs, side = draw.channels(full[0]), draw.channels(full[1]), draw.side(full[2])
        tensors = {"x": draw.input(side, side, inputs), "weight": draw.weight(outputs, inputs, 3, 3), "bias": draw.bias(outputs)}
        yield "conv2d", (*full, stride), tensors, {"stride": stride}
    for full in RESNET_CONVOLUTIONS:
        inputs, outputs, side = draw.channels(full[0]), draw.channels(full[1]), draw.side(full[2])
        yield "resnet_conv", full, {
            "x": draw.input(side, side, inputs),
            "norm_weight": draw.scale(inputs),
            "norm_bias": draw.bias(inputs),
            "weight": draw.weight(outputs, inputs, 3, 3),
            "bias": draw.bias(outputs),
            "shift": draw.input(outputs),
            "residual": draw.input(side, side, outputs),
        }, {"groups": GROUPS, "eps": 1e-5}
    for *full, residual in LINEARS:
        positions, inputs, outputs = draw.positions(full[0]), draw.channels(full[1]), draw.channels(full[2])
        tensors = {"x": draw.input(positions, inputs), "weight": draw.weight(outputs, inputs), "bias": draw.bias(outputs)}
        yield "linear", full, tensors | ({"residual": draw.input(positions, outputs)} if residual else {}), {}
    for full in SELF_ATTENTIONS:
        positions, heads, size = draw.positions(full[0]), draw.heads(full[1]), full[2]
        yield "self_attention", full, {"qkv": draw.input(positions, 3 * heads * size)}, {"heads": heads}
    for full in CROSS_ATTENTIONS:
        positions, heads, size = draw.positions(full[0]), draw.heads(full[1]), full[2]
        tensors = {"q": draw.input(positions, heads * size)}
        tensors |= {name: draw.input(TOKENS, heads * size) for name in ("keys", "values")}
        yield "cross_attention", full, tensors, {"heads": heads}
    for *full, eps, activate in GROUP_NORMS:
        channels, side = draw.channels(full[0]), draw.side(full[1])
        tensors = {"x": draw.input(side, side, channels), "weight": draw.scale(channels), "bias": draw.bias(channels)}
        yield "group_norm", full, tensors, {"groups": GROUPS, "eps": eps, "activate": activate}
    for full in LAYER_NORMS:
        positions, channels = draw.positions(full[0]), draw.channels(full[1])
        tensors = {"x": draw.input(positions, channels), "weight": draw.scale(channels), "bias": draw.bias(channels)}
        yield "layer_norm", full, tensors, {"eps": 1e-5}
    for full in FEED_FORWARDS:
        positions, channels = draw.positions(full[0]), draw.channels(full[1])
        yield "geglu_feed_forward", full, {
            "x": draw.input(positions, channels),
            "w1": draw.weight(8 * channels, channels),
            "b1": draw.bias(8 * channels),
            "w2": draw.weight(channels, 4 * channels),
            "b2": draw.bias(channels),
        }, {}


@torch.inference_mode()
def computed(op, tensors, parameters):
    """The layer's output in f32 from tensors of a smaller type, and PyTorch's error when it computes in that type."""
    exact = OPS[op](**{name: tensor.float() for name, tensor in tensors.items()}, **parameters)
    peer = OPS[op](**tensors, **parameters).float()
    return exact.contiguous(), (torch.linalg.vector_norm(peer - exact) / torch.linalg.vector_norm(exact)).item()


def main():
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    described, stored = [], {}
    for op, full, tensors, parameters in layers(Draw(args)):
        name = "_".join([op, *map(str, full)])
        tensors = {key: tensor.to(DTYPES[args.dtype]) for key, tensor in tensors.items()}
        out, error = computed(op, {key: tensor.to(args.device) for key, tensor in tensors.items()}, parameters)
        stored |= {f"{name}.{key}": tensor for key, tensor in (tensors | {"out": out.cpu()}).items()}
        described.append({"name": name, "op": op} | parameters | {"peer_error": error})
        print(json.dumps(described[-1]), flush=True)
    args.dir.mkdir(parents=True, exist_ok=True)
    save_file(stored, args.dir / "layers.safetensors")
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    description = {"torch": torch.__version__, "device": device, "dtype": args.dtype, "layers": described}
    (args.dir / "layers.json").write_text(json.dumps(description, indent=1))


if __name__ == "__main__":
    main()
