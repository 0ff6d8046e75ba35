"""LoRA of Wan, HunyuanVideo and LTX-Video with diffusers' transformers, as finetrainers and diffusion-pipe train it.

- latents of videos were computed before, and embeddings of texts with `cached=all`
- the transformer in bf16 under autocast, but for what diffusers keeps in fp32; LoRA in fp32 on the attention's
  projections, or on all linear layers of the blocks
- of Wan 2.2 A14B one of both transformers, while the other waits on the host
"""

import torch

model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
micro_batch = 1  # videos of a batch
frames = 81
height = 480  # pixels
width = 832  # pixels
rank = 32
base_precision = "16bit"  # 16bit | fp32
quantization = "none"  # none | nf4 | fp8 | quanto | uint7 | uint6 | uint5 | uint4 | uint3 | uint2
blocks_swapped = 0  # blocks that wait on the host; 0: none
gradient_checkpointing = True
checkpoints = "card"  # card | host
cached = "all"  # latents | all
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
ema = False  # averaged weights of the adapters
text_millions = 4762  # weights of the text encoder

from parts.steps import optimizer_of, update  # noqa: E402
from parts.transformer import loaded, text_encoder, trained_weights  # noqa: E402

dtype = torch.bfloat16
kept = dtype if base_precision == "16bit" else torch.float32
encoder = text_encoder(text_millions, quantization) if cached == "latents" else None
transformer, layers = loaded(model, kept, quantization, ("norm", "scale_shift_table"))
if targets == "attention":
    layers = [name for name in layers if name.endswith(("to_k", "to_q", "to_v", "to_out.0"))]
trained = trained_weights(
    transformer, rank, layers, torch.float32, gradient_checkpointing, checkpoints, blocks_swapped
)
steps, averaged = optimizer_of(trained, optimizer, ema)
config, kind = transformer.config, type(transformer).__name__
# What a latent stands for: frames, pixels.
is_wan_5b = kind == "WanTransformer3DModel" and config.out_channels == 48
each_frames, each_pixels = (8, 32) if kind == "LTXVideoTransformer3DModel" else (4, 8)
if is_wan_5b or kind == "HunyuanVideo15Transformer3DModel":
    each_pixels = 16
count, rows, columns = (frames - 1) // each_frames + 1, height // each_pixels, width // each_pixels


def texts(length, width):
    return torch.zeros(micro_batch, length, width, dtype=dtype, device="cuda")


def heard(length):
    return torch.ones(micro_batch, length, dtype=torch.bool, device="cuda")


def predicted(noisy, sigma):
    if kind == "LTXVideoTransformer3DModel":
        tokens, words = noisy.flatten(2).transpose(1, 2), texts(128, config.caption_channels)
        return transformer(
            tokens, words, 1000 * sigma, heard(128), count, rows, columns, return_dict=False
        )[0]
    if kind == "HunyuanVideoTransformer3DModel":
        pooled, guidance = (
            texts(1, config.pooled_projection_dim)[:, 0],
            1000 * torch.ones_like(sigma),
        )
        words = texts(256, config.text_embed_dim)
        return transformer(
            noisy, 1000 * sigma, words, heard(256), pooled, guidance, return_dict=False
        )[0]
    # What stands beside the noise: a mask, and the latents of an image.
    given = torch.zeros(
        micro_batch, config.in_channels - config.out_channels, count, rows, columns, dtype=dtype
    )
    noisy = torch.cat([noisy, given.cuda()], 1)
    if kind == "HunyuanVideo15Transformer3DModel":
        words, glyphs = texts(1000, config.text_embed_dim), texts(256, config.text_embed_2_dim)
        own = {"encoder_hidden_states_2": glyphs, "encoder_attention_mask_2": heard(256)}
        own["image_embeds"] = texts(729, config.image_embed_dim)
        return transformer(noisy, 1000 * sigma, words, heard(1000), **own, return_dict=False)[0]
    if is_wan_5b:  # it takes a time for each token
        sigma = sigma.view(-1, 1).repeat(1, count * (rows // 2) * (columns // 2))
    return transformer(noisy, 1000 * sigma, texts(512, config.text_dim), return_dict=False)[0]


for _ in range(2):
    latents = torch.zeros(
        micro_batch, config.out_channels, count, rows, columns, dtype=dtype
    ).cuda()
    noise, sigma = torch.randn_like(latents), torch.rand(micro_batch, device="cuda", dtype=dtype)
    mixed = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cuda", dtype):
        velocity = predicted((1 - mixed) * latents + mixed * noise, sigma)
    loss = torch.nn.functional.mse_loss(
        velocity.float(), (noise - latents).float().view_as(velocity)
    )
    update(loss, trained, steps, averaged)
