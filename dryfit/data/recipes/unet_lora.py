"""LoRA of Stable Diffusion and SDXL with diffusers, as its train_text_to_image_lora.py and _lora_sdxl.py.

- what is cached is encoded once, and its models leave the card; the rest is encoded in each step by models that stay
- U-Net, VAE and text encoders in 16 bits, LoRA on the attention's projections, or on all linear layers of the blocks
- adapters are in fp32 beside fp16, and else as the weights; rank 0 trains all of the U-Net in fp32 under autocast
"""

from functools import cache

import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params, free_memory
from peft import LoraConfig
from transformers import Adafactor, CLIPTextModel, CLIPTextModelWithProjection

model = "stabilityai/stable-diffusion-xl-base-1.0"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
precision = "bf16"  # bf16 | fp16 | fp32
rank = 4  # of LoRA; 0 trains all weights
gradient_checkpointing = False
cached = "none"  # none | latents | texts | all
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
adapter_precision = "auto"  # auto | fp32 | 16bit
ema = False  # averaged weights of what is trained

dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype if rank else torch.float32)
unet.cuda().requires_grad_(not rank)
vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype).cuda()
is_xl = unet.config.addition_embed_type == "text_time"
texts = [CLIPTextModel.from_pretrained(model, subfolder="text_encoder", dtype=dtype).cuda()]
if is_xl:
    second = CLIPTextModelWithProjection.from_pretrained(model, subfolder="text_encoder_2", dtype=dtype)
    texts.append(second.cuda())
for frozen in (vae, *texts):
    frozen.requires_grad_(False)


@torch.no_grad()
def encoded_texts():
    words = torch.ones(micro_batch, 77, dtype=torch.long, device="cuda")
    outputs = [each(words, output_hidden_states=True) for each in texts]
    embedded = torch.cat([each.hidden_states[-2] for each in outputs], -1) if is_xl else outputs[0][0]
    return embedded, outputs[-1][0] if is_xl else None


@torch.no_grad()
def encoded_images():
    latents = vae.encode(torch.zeros(micro_batch, 3, size, size, dtype=dtype, device="cuda")).latent_dist.sample()
    return latents * vae.config.scaling_factor


if cached in ("texts", "all"):
    encoded_texts = cache(encoded_texts)
    encoded_texts()
    texts = second = frozen = None
if cached in ("latents", "all"):
    encoded_images = cache(encoded_images)
    encoded_images()
    vae = None
free_memory()
if rank:
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    if targets == "linear":
        layers += ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
if adapter_precision == "fp32" or (adapter_precision == "auto" and precision == "fp16"):
    cast_training_params(unet, dtype=torch.float32)
if gradient_checkpointing:
    unet.enable_gradient_checkpointing()
trained = [weight for weight in unet.parameters() if weight.requires_grad]
if optimizer == "adafactor":
    steps = Adafactor(trained, lr=1e-4, scale_parameter=False, relative_step=False)
else:
    steps = {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit}[optimizer](trained, lr=1e-4)
averaged = EMAModel(trained) if ema else None
scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16" and adapter_precision != "16bit")
for _ in range(2):
    latents, (embedded, pooled) = encoded_images(), encoded_texts()
    noise = torch.randn_like(latents)
    times = torch.zeros(micro_batch, dtype=torch.long, device="cuda")
    added = {"text_embeds": pooled, "time_ids": torch.zeros(micro_batch, 6, device="cuda")} if is_xl else None
    with torch.autocast("cuda", dtype, enabled=precision != "fp32"):
        predicted = unet(latents + noise, times, embedded, added_cond_kwargs=added, return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
    scaler.scale(loss).backward()
    scaler.unscale_(steps)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    scaler.step(steps)
    scaler.update()
    steps.zero_grad()
    if ema:
        averaged.step(trained)
