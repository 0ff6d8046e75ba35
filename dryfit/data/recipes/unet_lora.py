"""LoRA of Stable Diffusion and SDXL with diffusers, as its train_text_to_image_lora.py and _lora_sdxl.py.

- what is cached is encoded once, and its models leave the card; the rest is encoded in each step by models that stay
- U-Net, VAE and text encoders in 16 bits, LoRA on the attention's projections, or on all linear layers of the blocks
- texts_trained: LoRA on the text encoders too, on the same kinds of layers, and with rank 0 all of their weights; texts
  are not cached then
- adapters are in fp32 beside fp16, and else as the weights; rank 0 trains all of the U-Net, in fp32 under autocast
"""

from functools import cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import cast_training_params, free_memory
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTextModel, CLIPTextModelWithProjection

model = "stabilityai/stable-diffusion-xl-base-1.0"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
precision = "bf16"  # bf16 | fp16 | fp32
rank = 4  # of LoRA; 0 trains all weights
base_precision = "auto"  # auto | 16bit | fp32
gradient_checkpointing = False
cached = "none"  # none | latents | texts | all
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
adapter_precision = "auto"  # auto | fp32 | 16bit
ema = False  # averaged weights of what is trained
texts_trained = False  # adapters of the text encoders

from parts.steps import optimizer_of, update  # noqa: E402

dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
kept = dtype if base_precision == "16bit" or (rank and base_precision == "auto") else torch.float32
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=kept)
unet.cuda().requires_grad_(not rank)
vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype).cuda()
is_xl = unet.config.addition_embed_type == "text_time"
whole = texts_trained and not rank
texts = [
    CLIPTextModel.from_pretrained(
        model, subfolder="text_encoder", dtype=kept if whole else dtype
    ).cuda()
]
if is_xl:
    second = CLIPTextModelWithProjection.from_pretrained(
        model, subfolder="text_encoder_2", dtype=kept if whole else dtype
    )
    texts.append(second.cuda())
for frozen in (vae, *texts):
    frozen.requires_grad_(whole and frozen is not vae)


@torch.set_grad_enabled(texts_trained)
def encoded_texts():
    words = torch.ones(micro_batch, 77, dtype=torch.long, device="cuda")
    outputs = [each(words, output_hidden_states=True) for each in texts]
    embedded = (
        torch.cat([each.hidden_states[-2] for each in outputs], -1) if is_xl else outputs[0][0]
    )
    return embedded, outputs[-1][0] if is_xl else None


@torch.no_grad()
def encoded_images():
    latents = vae.encode(
        torch.zeros(micro_batch, 3, size, size, dtype=dtype, device="cuda")
    ).latent_dist.sample()
    return latents * vae.config.scaling_factor


if cached in ("texts", "all") and not texts_trained:
    encoded_texts = cache(encoded_texts)
    encoded_texts()
    texts, second, frozen = [], None, None
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
inner = ["q_proj", "k_proj", "v_proj", "out_proj"] + (["fc1", "fc2"] if targets == "linear" else [])
for encoder in texts if texts_trained and rank else ():
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=inner), encoder)
if adapter_precision == "fp32" or (adapter_precision == "auto" and precision == "fp16"):
    cast_training_params([unet, *texts], dtype=torch.float32)
if gradient_checkpointing:
    unet.enable_gradient_checkpointing()
    for encoder in texts if texts_trained else ():
        encoder.gradient_checkpointing_enable()
trained = [
    weight for network in (unet, *texts) for weight in network.parameters() if weight.requires_grad
]
steps, averaged = optimizer_of(trained, optimizer, ema)
scaler = torch.amp.GradScaler(
    "cuda", enabled=torch.float16 not in {each.dtype for each in trained} and precision == "fp16"
)
for _ in range(2):
    latents, (embedded, pooled) = encoded_images(), encoded_texts()
    noise = torch.randn_like(latents)
    times = torch.zeros(micro_batch, dtype=torch.long, device="cuda")
    added = (
        {"text_embeds": pooled, "time_ids": torch.zeros(micro_batch, 6, device="cuda")}
        if is_xl
        else None
    )
    with torch.autocast("cuda", dtype, enabled=precision != "fp32"):
        predicted = unet(
            latents + noise, times, embedded, added_cond_kwargs=added, return_dict=False
        )[0]
    loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
    update(loss, trained, steps, averaged, scaler)
