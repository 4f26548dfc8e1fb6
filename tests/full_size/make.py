"""Writes a model of full size with seeded random weights, and diffusers' outputs for it in float32.

    pip install torch==2.15.0 diffusers==0.36.0 transformers==4.57.6 safetensors
    python make.py sd15|sd2|bk-sdm-tiny DIR
    ELBO_FULL_SIZE=DIR cargo test --release --test full_size -- --ignored --nocapture

The configurations are those of stable-diffusion-v1-5, of stabilityai/stable-diffusion-2-base and of nota-ai/bk-sdm-tiny; weights are stored in f16
(about 2 GB) and both sides compute with these values in f32. DIR/reference.safetensors holds `ids` [2, 77], `embeds`
[2, 77, C], `pixels` [1, 3, 256, 256], `latents` [1, 4, 32, 32] (the posterior's mean, scaled), `x_t` [1, 4, 64, 64],
`timestep` [1] and `epsilon` [2, 4, 64, 64].
"""
import gc
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

UNET = dict(
    sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    act_fn="silu", norm_num_groups=32, norm_eps=1e-5, center_input_sample=False, flip_sin_to_cos=True, freq_shift=0,
    downsample_padding=1, mid_block_scale_factor=1,
)
VAE = dict(
    in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    act_fn="silu", norm_num_groups=32,
)
TEXT = dict(vocab_size=49408, max_position_embeddings=77, layer_norm_eps=1e-5, projection_dim=768)
SD15 = (
    dict(UNET, cross_attention_dim=768, attention_head_dim=8),
    dict(VAE, sample_size=512),
    dict(TEXT, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
         hidden_act="quick_gelu"),
)
TINY = dict(
    layers_per_block=1, mid_block_type=None, block_out_channels=(320, 640, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
)
MODELS = {
    "sd15": SD15,
    "bk-sdm-tiny": (dict(SD15[0], **TINY), *SD15[1:]),
    "sd2": (
        dict(UNET, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        dict(VAE, sample_size=768),
        dict(TEXT, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
             hidden_act="gelu", projection_dim=512),
    ),
}


def stored(model, path):
    """Saves a model in f16 and returns it with the saved values, in f32."""
    model.half().save_pretrained(path, safe_serialization=True)
    return model.float().eval()


@torch.no_grad()
def main(name, path):
    unet, vae, text = MODELS[name]
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    tensors = {"ids": torch.randint(0, 49408, (2, 77), generator=generator)}

    model = stored(CLIPTextModel(CLIPTextConfig(**text)), path / "text_encoder")
    tensors["embeds"] = model(tensors["ids"]).last_hidden_state
    del model
    gc.collect()

    model = stored(AutoencoderKL(**vae), path / "vae")
    tensors["pixels"] = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    tensors["latents"] = model.encode(tensors["pixels"]).latent_dist.mean * model.config.scaling_factor
    del model
    gc.collect()

    model = stored(UNet2DConditionModel(**unet), path / "unet")
    tensors["x_t"] = torch.randn(1, 4, 64, 64, generator=generator)
    tensors["timestep"] = torch.tensor([601])
    epsilon = [model(tensors["x_t"], 601, embeds[None]).sample for embeds in tensors["embeds"]]
    tensors["epsilon"] = torch.cat(epsilon)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "reference.safetensors")
    for key, tensor in tensors.items():
        print(key, tuple(tensor.shape), f"up to {tensor.abs().max():.3g}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1], Path(sys.argv[2]))
