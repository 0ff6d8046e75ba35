"""LoRA of Wan 2.1 with diffusers' transformer, latents at hand, as finetrainers and diffusion-pipe train it.

- latents of videos and embeddings of texts (512 tokens) were computed before: VAE and text encoder are not on the card
- the transformer in bf16 under autocast, but for the norms and tables that diffusers keeps in fp32; LoRA in fp32
"""

import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import WanTransformer3DModel
from peft import LoraConfig

model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
micro_batch = 1  # videos of a batch
frames = 81
height = 480  # pixels
width = 832  # pixels
rank = 32
gradient_checkpointing = True
optimizer = "adamw"  # adamw | adamw_8bit

dtype = torch.bfloat16
transformer = WanTransformer3DModel.from_pretrained(model, subfolder="transformer", torch_dtype=dtype).cuda()
transformer.requires_grad_(False)
if gradient_checkpointing:
    transformer.enable_gradient_checkpointing()
transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
trained = [weight for weight in transformer.parameters() if weight.requires_grad]
for weight in trained:
    weight.data = weight.float()
steps = AdamW8bit(trained, lr=1e-4) if optimizer == "adamw_8bit" else torch.optim.AdamW(trained, lr=1e-4)
for _ in range(2):
    shape = micro_batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8
    latents = torch.zeros(shape, dtype=dtype).cuda()
    words = torch.zeros(micro_batch, 512, transformer.config.text_dim, dtype=dtype).cuda()
    noise, sigma = torch.randn_like(latents), torch.rand(micro_batch, device="cuda", dtype=dtype)
    noisy = (1 - sigma.view(-1, 1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1, 1) * noise
    with torch.autocast("cuda", dtype):
        predicted = transformer(noisy, 1000 * sigma, words, return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(predicted.float(), (noise - latents).float())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    steps.step()
    steps.zero_grad()
