"""Diffusion Classifier (Li et al. 2023) in plain PyTorch + diffusers: the peer that the benchmark compares with.

    python classify.py --model DIR --images DIR --prompts prompts.csv --keep 5,1 --samples 20,100 --limit 100

Images are in <images>/<class>/<file>; prompts.csv has the columns prompt,classname (a DiT has its own classes). The
schedule is the reference's: with N the largest number of samples and s = T // N, the grid is s//2, s//2 + s, ...; a stage
of n samples takes every (N//n)th point of it less those done, and the j-th timestep ever evaluated uses noise row j.
Prints one JSON object. Model loading, text encoding and a warm-up image are not timed; image decoding and VAE are.
"""
import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


def arguments():
    integers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory in diffusers layout")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--keep", type=integers, default=[5, 1], help="prompts kept after each stage")
    parser.add_argument("--samples", type=integers, default=[20, 100], help="timesteps of each stage")
    parser.add_argument("--loss", choices=LOSSES, default="l2")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--limit", type=int, help="only this many images, sorted by path")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise, which is drawn for every image")
    parser.add_argument("--noise", type=Path, help="safetensors with 'noise' [N, C, H, W], used for every image")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", type=Path, help="also write every image's errors here")
    args = parser.parse_args()
    if len(args.keep) != len(args.samples) or args.keep[-1] != 1:
        parser.error("--keep and --samples need as many numbers, and the last of --keep must be 1")
    return args


class Model:
    """A latent diffusion model, the condition of each prompt, and the name of each prompt's class."""

    def __init__(self, args):
        self.vae = AutoencoderKL.from_pretrained(args.model / "vae").eval()
        scheduler = DDPMScheduler.from_pretrained(args.model / "scheduler")
        self.alphas_cumprod, self.prediction = scheduler.alphas_cumprod, scheduler.config.prediction_type
        index = json.loads((args.model / "model_index.json").read_text())
        self.conditional = "transformer" in index
        if self.conditional:
            self.net = DiTTransformer2DModel.from_pretrained(args.model / "transformer").eval()
            self.classes = [index["id2label"][str(i)] for i in range(len(index["id2label"]))]
            self.conditions = torch.arange(len(self.classes))
        else:
            self.net = UNet2DConditionModel.from_pretrained(args.model / "unet").eval()
            with open(args.prompts, newline="") as file:
                rows = list(csv.DictReader(file))
            self.classes = [row["classname"] for row in rows]
            self.conditions = encode_prompts(args.model, [row["prompt"] for row in rows])
            self.guidance = no_guidance(self.net.config.time_cond_proj_dim)
        config = self.net.config
        self.size = config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        if args.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        if args.compile:
            self.net = torch.compile(self.net)

    def encode(self, path):
        """The latent [1, C, H, W] of an image: the posterior's mean."""
        image = Image.open(path)
        width, height = image.size
        scale = lambda side: int(self.size * side / min(width, height))
        if min(width, height) != self.size:
            image = image.resize((scale(width), scale(height)), Image.Resampling.BICUBIC)
        left, top = (round((side - self.size) / 2) for side in image.size)
        image = image.crop((left, top, left + self.size, top + self.size)).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 255 * 2 - 1
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor

    def errors(self, latent, noise, timesteps, prompts, loss, batch_size):
        """The mean error of each (timestep, noise row, prompt)."""
        of_batches = []
        for t, eps, p in zip(timesteps.split(batch_size), noise.split(batch_size), prompts.split(batch_size)):
            error = LOSSES[loss](self.epsilon(latent, t, eps, p), eps, reduction="none")
            of_batches.append(error.mean((1, 2, 3)))
        return torch.cat(of_batches)

    def epsilon(self, latent, t, noise, prompts):
        """The noise that the network predicts in the latents at timesteps t."""
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latent + (1 - abar).sqrt() * noise
        if self.conditional:
            output = self.net(noisy, timestep=t, class_labels=self.conditions[prompts], return_dict=False)[0]
            output = output[:, : latent.shape[1]]
        else:
            condition = {"encoder_hidden_states": self.conditions[prompts], "timestep_cond": self.guidance}
            output = self.net(noisy, t, **condition, return_dict=False)[0]
        return abar.sqrt() * output + (1 - abar).sqrt() * noisy if self.prediction == "v_prediction" else output


def no_guidance(width):
    """A pipeline's condition at guidance_scale 1 for a network distilled with a guidance scale (an LCM); else None."""
    if width is None:
        return None
    return StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.zeros(1), embedding_dim=width)


@torch.inference_mode()
def encode_prompts(model, prompts):
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids)[0]


def classify(model, latent, noise, args):
    """The best prompt and every prompt's errors: after each stage the prompts with the lowest means stay."""
    most, total = max(args.samples), len(model.alphas_cumprod)
    grid = list(range(total // most // 2, total, total // most))[:most]
    done, remaining = [], list(range(len(model.classes)))
    errors = {prompt: torch.empty(0) for prompt in remaining}
    for samples, keep in zip(args.samples, args.keep):
        step = most // samples
        fresh = [t for t in grid[step // 2 :: step][:samples] if t not in done]
        rows = torch.arange(len(done), len(done) + len(fresh)).repeat(len(remaining))
        timesteps = torch.tensor(fresh).repeat(len(remaining))
        prompts = torch.tensor(remaining).repeat_interleave(len(fresh))
        new = model.errors(latent, noise[rows], timesteps, prompts, args.loss, args.batch_size)
        for prompt, of_prompt in zip(remaining, new.view(len(remaining), -1)):
            errors[prompt] = torch.cat([errors[prompt], of_prompt])
        done += fresh
        remaining = sorted(sorted(remaining, key=lambda prompt: errors[prompt].mean().item())[:keep])
    return remaining[0], errors


@torch.inference_mode()
def run(model, files, args):
    """(file, predicted class, errors) of every image, and the seconds it took."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (max(args.samples), *model.encode(files[0]).shape[1:])
    fixed = load_file(args.noise)["noise"] if args.noise else None
    draw = lambda: torch.randn(shape, generator=generator) if fixed is None else fixed
    classify(model, model.encode(files[0]), torch.zeros(shape), args)
    start, results = time.perf_counter(), []
    for path in files:
        best, errors = classify(model, model.encode(path), draw(), args)
        results.append((path, model.classes[best], errors))
    return results, time.perf_counter() - start


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    files = [path for path in args.images.glob("*/*") if path.is_file()]
    files = sorted(files, key=Path.as_posix)[: args.limit]
    results, seconds = run(Model(args), files, args)
    right = sum(path.parent.name == predicted for path, predicted, _ in results)
    evaluations = sum(len(of_prompt) for *_, errors in results for of_prompt in errors.values())
    summary = {
        "images": len(files),
        "accuracy": right / len(files),
        "seconds": seconds,
        "images_per_second": len(files) / seconds,
        "evaluations": evaluations,
        "evaluations_per_second": evaluations / seconds,
    }
    print(json.dumps(summary))
    if args.json:
        rows = [
            {"key": path.relative_to(args.images).as_posix(), "predicted": predicted,
             "errors": [of_prompt.tolist() for of_prompt in errors.values()]}
            for path, predicted, errors in results
        ]
        args.json.write_text(json.dumps({"summary": summary, "results": rows}))


if __name__ == "__main__":
    main()
