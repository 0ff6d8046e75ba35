"""LoRA of FLUX with diffusers, as its train_dreambooth_lora_flux.py: the transformer in bf16, in 8 or in 4 bits.

- what is cached is encoded before the transformer comes to the card; the rest in each step by encoders that stay
- images of size x size pixels; texts of 512 tokens; LoRA on the attention of all blocks, or on all
  their linear layers; all in bf16; rank 0 trains all of the transformer
- fp8: weights kept in 8 bits, and in bf16 while their layer computes; quanto: the same for each product, with scales,
  and T5 too
- references: images of the same size beside each one, as Kontext takes them
"""

from functools import cache

import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import AutoencoderKL, BitsAndBytesConfig, FluxPipeline, FluxTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.training_utils import EMAModel, free_memory
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import Adafactor, CLIPTextModel, T5EncoderModel

model = "black-forest-labs/FLUX.1-dev"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
rank = 16  # of LoRA; 0 trains all weights
quantization = "none"  # none | nf4 | fp8 | quanto
gradient_checkpointing = True
cached = "all"  # none | latents | texts | all
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
references = 0  # images beside each one
samples = 0  # pixels of a side of an image that is drawn between steps; 0: none
ema = False  # averaged weights of the adapters
adapter_precision = "16bit"  # 16bit | fp32
low_vram = True  # weights are quantized on the host, by quanto

from parts.eight_bits import in_eight_bits  # noqa: E402

dtype = torch.bfloat16
clip = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", dtype=dtype).cuda()
t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_2", dtype=dtype)
if quantization == "quanto":
    in_eight_bits(t5)
t5.cuda()
vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype).cuda()
for frozen in (clip, t5, vae):
    frozen.requires_grad_(False)


@torch.no_grad()
def encoded_texts():
    words = torch.ones(micro_batch, 77, dtype=torch.long, device="cuda")
    pooled = clip(words).pooler_output
    return pooled, t5(torch.ones(micro_batch, 512, dtype=torch.long, device="cuda"))[0]


@torch.no_grad()
def encoded_images():
    latents = vae.encode(torch.zeros(micro_batch, 3, size, size, dtype=dtype, device="cuda")).latent_dist.sample()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


if cached in ("texts", "all"):
    encoded_texts = cache(encoded_texts)
    encoded_texts()
    clip = t5 = None
if cached in ("latents", "all"):
    encoded_images = cache(encoded_images)
    encoded_images()
    vae = vae.cpu() if samples else None
    frozen = None
free_memory()
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
transformer = FluxTransformer2DModel.from_pretrained(
    model, subfolder="transformer", torch_dtype=dtype, quantization_config=four_bit if quantization == "nf4" else None
)
if quantization == "nf4":
    transformer = prepare_model_for_kbit_training(transformer, use_gradient_checkpointing=False)
if quantization == "fp8":
    apply_layerwise_casting(transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=())
if quantization == "quanto":
    in_eight_bits(transformer if low_vram else transformer.cuda())
transformer = transformer.cuda().requires_grad_(not rank)
if gradient_checkpointing:
    transformer.enable_gradient_checkpointing()
layers = ["to_k", "to_q", "to_v", "to_out.0"]
if targets == "linear":
    layers += ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2", "proj_mlp", "proj_out"]
    layers += ["norm.linear", "norm1.linear", "norm1_context.linear"]
if rank:
    transformer.add_adapter(LoraConfig(r=rank, target_modules=layers))
trained = [weight for weight in transformer.parameters() if weight.requires_grad]
for weight in trained:
    weight.data = weight.data.to(dtype if adapter_precision == "16bit" else torch.float32)
if optimizer == "adafactor":
    steps = Adafactor(trained, lr=1e-4, scale_parameter=False, relative_step=False)
else:
    steps = {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit}[optimizer](trained, lr=1e-4)
averaged = EMAModel(trained) if ema else None


def predicted(noisy, sigma, pooled, text, side):
    rows, count = side // 16, (1 + references) * (side // 16)
    packed = FluxPipeline._pack_latents(noisy, len(noisy), noisy.shape[1], 2 * rows, 2 * rows)
    velocity = transformer(
        torch.cat([packed] * (1 + references), 1),
        timestep=sigma,
        guidance=torch.ones(len(noisy), device="cuda") if transformer.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(512, 3, device="cuda", dtype=dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(len(noisy), count, rows, "cuda", dtype),
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
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    steps.step()
    steps.zero_grad()
    if ema:
        averaged.step(trained)
    if samples:
        velocity = loss = None
        drawn = torch.randn(1, latents.shape[1], samples // 8, samples // 8, device="cuda", dtype=dtype)
        with torch.no_grad(), torch.autocast("cuda", dtype):
            drawn = drawn - predicted(drawn, sigma[:1], pooled[:1], text[:1], samples).to(dtype)
            vae.cuda().decode(drawn)
