"""LoRA of FLUX with diffusers, as its train_dreambooth_lora_flux.py: the transformer in bf16, in 8 or in 4 bits.

- what is cached is encoded before the transformer comes to the card; the rest in each step by encoders that stay
- texts of 512 tokens; LoRA on the attention of all blocks, or on all their linear layers; all in bf16; rank 0 trains
  all of the transformer
- T5 is in 8 bits beside weights in 8 bits with scales, or in fewer
- references: images of the same size beside each one, as Kontext takes them
"""

from functools import cache

import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.training_utils import free_memory
from transformers import CLIPTextModel, T5EncoderModel

model = "black-forest-labs/FLUX.1-dev"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
rank = 16  # of LoRA; 0 trains all weights
base_precision = "16bit"  # 16bit | fp32
quantization = "none"  # none | nf4 | fp8 | quanto | uint7 | uint6 | uint5 | uint4 | uint3 | uint2
blocks_swapped = 0  # blocks that wait on the host; 0: none
gradient_checkpointing = True
checkpoints = "card"  # card | host
cached = "all"  # none | latents | texts | all
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
references = 0  # images beside each one
samples = 0  # pixels of a side of an image that is drawn between steps; 0: none
ema = False  # averaged weights of the adapters
adapter_precision = "16bit"  # 16bit | fp32
low_vram = (
    True  # weights are quantized on the host, by quanto; else on the card, before the encoders come
)

from parts.eight_bits import in_eight_bits  # noqa: E402
from parts.steps import optimizer_of, update  # noqa: E402
from parts.transformer import loaded, trained_weights  # noqa: E402

dtype = torch.bfloat16
kept = dtype if base_precision == "16bit" else torch.float32
if not low_vram:
    transformer, layers = loaded(model, kept, quantization, whole=True, on_host=False)
clip = (
    CLIPTextModel.from_pretrained(model, subfolder="text_encoder", dtype=dtype)
    .cuda()
    .requires_grad_(False)
)
t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_2", dtype=dtype).requires_grad_(
    False
)
if quantization == "quanto" or "uint" in quantization:
    in_eight_bits(t5)
t5.cuda()
vae = (
    AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype)
    .cuda()
    .requires_grad_(False)
)


@torch.no_grad()
def encoded_texts():
    words = torch.ones(micro_batch, 77, dtype=torch.long, device="cuda")
    return clip(words).pooler_output, t5(
        torch.ones(micro_batch, 512, dtype=torch.long, device="cuda")
    )[0]


@torch.no_grad()
def encoded_images():
    latents = vae.encode(
        torch.zeros(micro_batch, 3, size, size, dtype=dtype, device="cuda")
    ).latent_dist.sample()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


if cached in ("texts", "all"):
    encoded_texts = cache(encoded_texts)
    encoded_texts()
    clip = t5 = None
if cached in ("latents", "all"):
    encoded_images = cache(encoded_images)
    encoded_images()
    vae = vae.cpu() if samples else None
free_memory()
if low_vram:
    transformer, layers = loaded(model, kept, quantization, whole=True)
if targets == "attention":
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
own = dtype if adapter_precision == "16bit" else torch.float32
trained = trained_weights(
    transformer, rank, layers, own, gradient_checkpointing, checkpoints, blocks_swapped
)
steps, averaged = optimizer_of(trained, optimizer, ema)


def predicted(noisy, sigma, pooled, text, side):
    rows, count = side // 16, (1 + references) * (side // 16)
    packed = FluxPipeline._pack_latents(noisy, len(noisy), noisy.shape[1], 2 * rows, 2 * rows)
    places = FluxPipeline._prepare_latent_image_ids(len(noisy), count, rows, "cuda", dtype)
    words = torch.zeros(512, 3, device="cuda", dtype=dtype)
    guidance = torch.ones(len(noisy), device="cuda") if transformer.config.guidance_embeds else None
    velocity = transformer(
        torch.cat([packed] * (1 + references), 1),
        text,
        pooled,
        sigma,
        places,
        words,
        guidance,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(velocity[:, : rows * rows], side, side, 8)


for _ in range(2):
    (pooled, text), latents = encoded_texts(), encoded_images()
    noise, sigma = torch.randn_like(latents), torch.rand(micro_batch, device="cuda", dtype=dtype)
    noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
    with torch.autocast("cuda", dtype):
        velocity = predicted(noisy, sigma, pooled, text, size)
    loss = (velocity.float() - (noise - latents).float()).square().mean()
    update(loss, trained, steps, averaged)
    if samples:
        velocity = loss = None
        drawn = torch.randn(
            1, latents.shape[1], samples // 8, samples // 8, device="cuda", dtype=dtype
        )
        with torch.no_grad(), torch.autocast("cuda", dtype):
            drawn = drawn - predicted(drawn, sigma[:1], pooled[:1], text[:1], samples).to(dtype)
            vae.cuda().decode(drawn)
