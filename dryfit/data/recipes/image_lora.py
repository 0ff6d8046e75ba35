"""LoRA of Qwen-Image, Z-Image and FLUX.2 with diffusers, as its train_dreambooth_lora scripts with latents at hand.

- latents of images and embeddings of texts (512 tokens) were computed before: VAE and text encoder are not on the card
- the transformer in bf16 under autocast, LoRA in fp32 on the attention's projections, or on all linear layers of the
  blocks; rank 0 trains all of the transformer in bf16
- fp8: weights kept in 8 bits, and in bf16 while their layer computes; quanto: the same for each product, with scales
- references: images of the same size beside each one, as Qwen-Image-Edit takes them
"""

import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import AutoModel, BitsAndBytesConfig
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, prepare_model_for_kbit_training

model = "Qwen/Qwen-Image"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
rank = 16  # of LoRA; 0 trains all weights
quantization = "none"  # none | nf4 | fp8 | quanto
gradient_checkpointing = True
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit
references = 0  # images beside each one, of Qwen-Image

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
    apply_layerwise_casting(transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=())
if quantization == "quanto":
    for _, layer in blocks:
        in_eight_bits(layer)
transformer = transformer.cuda().requires_grad_(not rank)
if gradient_checkpointing:
    transformer.enable_gradient_checkpointing()
attention = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out")
layers = [name for name, _ in blocks if targets == "linear" or name.endswith(attention)]
if rank:
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
trained = [weight for weight in transformer.parameters() if weight.requires_grad]
for weight in trained if rank else ():
    weight.data = weight.data.float()
steps = AdamW8bit(trained, lr=1e-4) if optimizer == "adamw_8bit" else torch.optim.AdamW(trained, lr=1e-4)
config, rows = transformer.config, size // 16


def predicted(noisy, sigma):
    if "cap_feat_dim" in config:  # Z-Image: lists of images and of texts
        texts = torch.zeros(micro_batch, 512, config.cap_feat_dim, dtype=dtype, device="cuda")
        return torch.stack(transformer(list(noisy.unbind()), 1 - sigma, list(texts.unbind()), return_dict=False)[0])
    texts = torch.zeros(micro_batch, 512, config.joint_attention_dim, dtype=dtype, device="cuda")
    if "axes_dims_rope" in config and len(config.axes_dims_rope) == 4:  # FLUX.2: four coordinates of each token
        places = {"img_ids": torch.zeros(rows * rows, 4).cuda(), "txt_ids": torch.zeros(512, 4).cuda()}
        guidance = torch.ones(micro_batch, device="cuda") if config.guidance_embeds else None
        return transformer(noisy, texts, sigma, guidance=guidance, **places, return_dict=False)[0]
    shapes = [[(1, rows, rows)] * (1 + references)] * micro_batch
    seen = torch.cat([noisy] * (1 + references), 1)
    return transformer(seen, texts, None, sigma, shapes, return_dict=False)[0][:, : rows * rows]


shape = (16, 1, size // 8, size // 8) if "cap_feat_dim" in config else (rows * rows, config.in_channels)
for _ in range(2):
    latents = torch.zeros(micro_batch, *shape, dtype=dtype).cuda()
    noise, sigma = torch.randn_like(latents), torch.rand(micro_batch, device="cuda", dtype=dtype)
    mixed = sigma.view(-1, *[1] * len(shape))
    with torch.autocast("cuda", dtype):
        velocity = predicted((1 - mixed) * latents + mixed * noise, sigma)
    loss = (velocity.float() - (noise - latents).float()).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    steps.step()
    steps.zero_grad()
