"""LoRA of Stable Diffusion 3 and 3.5 with diffusers, as its train_dreambooth_lora_sd3.py with latents at hand.

- latents and embeddings of texts (77 + 256 tokens) were computed before: VAE and text encoders are not on the card
- the transformer in 16 bits under autocast, LoRA on the attention's projections (in fp32 beside fp16), or on all linear
  layers of the blocks; rank 0 trains all of the transformer, in fp32 under autocast
- quanto: linear layers of the blocks in 8 bits with scales
"""

import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

model = "stabilityai/stable-diffusion-3.5-large"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
precision = "bf16"  # bf16 | fp16
rank = 4  # of LoRA; 0 trains all weights
quantization = "none"  # none | quanto
gradient_checkpointing = True
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit

from parts.eight_bits import in_eight_bits  # noqa: E402

dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
transformer = SD3Transformer2DModel.from_pretrained(
    model, subfolder="transformer", torch_dtype=dtype if rank else torch.float32
)
blocks = [(name, each) for name, each in transformer.transformer_blocks.named_modules()]
blocks = [(name, each) for name, each in blocks if isinstance(each, torch.nn.Linear)]
if quantization == "quanto":
    for _, layer in blocks:
        in_eight_bits(layer)
transformer = transformer.cuda().requires_grad_(not rank)
if gradient_checkpointing:
    transformer.enable_gradient_checkpointing()
layers = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"]
layers += ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"]
if targets == "linear":
    layers = [f"transformer_blocks.{name}" for name, _ in blocks]
if rank:
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
if precision == "fp16":
    cast_training_params(transformer, dtype=torch.float32)
trained = [weight for weight in transformer.parameters() if weight.requires_grad]
for weight in trained if quantization == "quanto" else ():
    weight.data = weight.data.float()  # beside weights in 8 bits they would be made in 8 bits
steps = AdamW8bit(trained, lr=1e-4) if optimizer == "adamw_8bit" else torch.optim.AdamW(trained, lr=1e-4)
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
    scaler.scale(loss).backward()
    scaler.unscale_(steps)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    scaler.step(steps)
    scaler.update()
    steps.zero_grad()
