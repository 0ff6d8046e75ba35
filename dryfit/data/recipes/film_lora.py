"""LoRA of Wan, HunyuanVideo and LTX-Video with diffusers' transformers, as finetrainers and diffusion-pipe train it.

- latents of videos and embeddings of texts were computed before: VAE and text encoders are not on the card
- the transformer in bf16 under autocast, but for what diffusers keeps in fp32; LoRA in fp32 on the attention's
  projections, or on all linear layers of the blocks
- fp8: weights kept in 8 bits, and in bf16 while their layer computes; quanto: the same for each product, with scales
"""

import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import AutoModel, BitsAndBytesConfig
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, prepare_model_for_kbit_training

model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
micro_batch = 1  # videos of a batch
frames = 81
height = 480  # pixels
width = 832  # pixels
rank = 32
quantization = "none"  # none | nf4 | fp8 | quanto
gradient_checkpointing = True
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit

from parts.eight_bits import in_eight_bits  # noqa: E402

dtype = torch.bfloat16
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
transformer = AutoModel.from_pretrained(
    model, subfolder="transformer", torch_dtype=dtype, quantization_config=four_bit if quantization == "nf4" else None
)
blocks = [(name, each) for name, each in transformer.named_modules() if isinstance(each, torch.nn.Linear)]
blocks = [(name, each) for name, each in blocks if any(part.isdigit() for part in name.split(".")[:-1])]
if quantization == "nf4":
    transformer = prepare_model_for_kbit_training(transformer, use_gradient_checkpointing=False)
if quantization == "fp8":
    apply_layerwise_casting(transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=("norm", "scale_shift_table"))
if quantization == "quanto":
    for _, layer in blocks:
        in_eight_bits(layer)
transformer = transformer.cuda().requires_grad_(False)
if gradient_checkpointing:
    transformer.enable_gradient_checkpointing()
attention = ("to_k", "to_q", "to_v", "to_out.0")
layers = [name for name, _ in blocks if targets == "linear" or name.endswith(attention)]
transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
trained = [weight for weight in transformer.parameters() if weight.requires_grad]
for weight in trained:
    weight.data = weight.data.float()
steps = AdamW8bit(trained, lr=1e-4) if optimizer == "adamw_8bit" else torch.optim.AdamW(trained, lr=1e-4)
config, kind = transformer.config, type(transformer).__name__
# What a latent stands for: frames, pixels.
each_frames, each_pixels = (8, 32) if kind == "LTXVideoTransformer3DModel" else (4, 8)
count, rows, columns = (frames - 1) // each_frames + 1, height // each_pixels, width // each_pixels


def texts(length, width):
    return torch.zeros(micro_batch, length, width, dtype=dtype, device="cuda")


def predicted(noisy, sigma):
    if kind == "LTXVideoTransformer3DModel":
        mask = torch.ones(micro_batch, 128, dtype=torch.bool, device="cuda")
        tokens, words = noisy.flatten(2).transpose(1, 2), texts(128, config.caption_channels)
        return transformer(tokens, words, 1000 * sigma, mask, count, rows, columns, return_dict=False)[0]
    if kind == "HunyuanVideoTransformer3DModel":
        mask = torch.ones(micro_batch, 256, dtype=torch.bool, device="cuda")
        pooled, guidance = texts(1, config.pooled_projection_dim)[:, 0], 1000 * torch.ones_like(sigma)
        words = texts(256, config.text_embed_dim)
        return transformer(noisy, 1000 * sigma, words, mask, pooled, guidance, return_dict=False)[0]
    return transformer(noisy, 1000 * sigma, texts(512, config.text_dim), return_dict=False)[0]


for _ in range(2):
    latents = torch.zeros(micro_batch, config.in_channels, count, rows, columns, dtype=dtype).cuda()
    noise, sigma = torch.randn_like(latents), torch.rand(micro_batch, device="cuda", dtype=dtype)
    mixed = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cuda", dtype):
        velocity = predicted((1 - mixed) * latents + mixed * noise, sigma)
    loss = torch.nn.functional.mse_loss(velocity.float(), (noise - latents).float().view_as(velocity))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    steps.step()
    steps.zero_grad()
