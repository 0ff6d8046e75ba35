"""LoRA of Stable Diffusion 3 and 3.5 with diffusers, as its train_dreambooth_lora_sd3.py with latents at hand.

- latents were computed before, and embeddings of texts (77 + 256 tokens) with `cached=all`
- the transformer in 16 bits under autocast, LoRA on the attention's projections (in fp32 beside fp16), or on all linear
  layers of the blocks; rank 0 trains all of the transformer, in fp32 under autocast
"""

import torch

model = "stabilityai/stable-diffusion-3.5-large"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
precision = "bf16"  # bf16 | fp16
rank = 4  # of LoRA; 0 trains all weights
base_precision = "auto"  # auto | 16bit | fp32
quantization = "none"  # none | nf4 | fp8 | quanto | uint7 | uint6 | uint5 | uint4 | uint3 | uint2
blocks_swapped = 0  # blocks that wait on the host; 0: none
gradient_checkpointing = True
checkpoints = "card"  # card | host
cached = "all"  # latents | all
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
ema = False  # averaged weights of what is trained
text_millions = 5581  # weights of the text encoders

from parts.steps import optimizer_of, update  # noqa: E402
from parts.transformer import loaded, text_encoder, trained_weights  # noqa: E402

dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
kept = dtype if base_precision == "16bit" or (rank and base_precision == "auto") else torch.float32
encoder = text_encoder(text_millions, quantization) if cached == "latents" else None
transformer, layers = loaded(model, kept, quantization)
if targets == "attention":
    inner = [
        "add_k_proj",
        "add_q_proj",
        "add_v_proj",
        "to_add_out",
        "to_k",
        "to_q",
        "to_v",
        "to_out.0",
    ]
    layers = [f"attn.{name}" for name in inner]
# Beside weights in 8 bits they would be made in 8 bits.
fp32 = torch.float32 if precision == "fp16" or quantization != "none" else None
trained = trained_weights(
    transformer, rank, layers, fp32, gradient_checkpointing, checkpoints, blocks_swapped
)
steps, averaged = optimizer_of(trained, optimizer, ema)
scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
config = transformer.config
for _ in range(2):
    latents = torch.zeros(micro_batch, config.in_channels, size // 8, size // 8, dtype=dtype).cuda()
    words = torch.zeros(micro_batch, 77 + 256, config.joint_attention_dim, dtype=dtype).cuda()
    pooled = torch.zeros(micro_batch, config.pooled_projection_dim, dtype=dtype).cuda()
    noise, sigma = torch.randn_like(latents), torch.rand(micro_batch, device="cuda", dtype=dtype)
    noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
    with torch.autocast("cuda", dtype):
        predicted = transformer(noisy, words, pooled, 1000 * sigma, return_dict=False)[0]
    predicted = predicted.float() * -sigma.view(-1, 1, 1, 1) + noisy
    loss = (predicted - latents.float()).square().reshape(micro_batch, -1).mean(1).mean()
    update(loss, trained, steps, averaged, scaler)
