"""LoRA of Qwen-Image, Z-Image, FLUX.2 and Chroma with diffusers, as its train_dreambooth_lora scripts.

- latents of images were computed before, and embeddings of texts (512 tokens) with `cached=all`
- the transformer in bf16 under autocast, LoRA in fp32 on the attention's projections, or on all linear layers of the
  blocks; rank 0 trains all of the transformer in bf16
- references: images of the same size beside each one, as Qwen-Image-Edit takes them
"""

import torch

model = "Qwen/Qwen-Image"
micro_batch = 1  # images of a batch
size = 1024  # pixels of a side
rank = 16  # of LoRA; 0 trains all weights
base_precision = "16bit"  # 16bit | fp32
quantization = "none"  # none | nf4 | fp8 | quanto | uint7 | uint6 | uint5 | uint4 | uint3 | uint2
blocks_swapped = 0  # blocks that wait on the host; 0: none
gradient_checkpointing = True
checkpoints = "card"  # card | host
cached = "all"  # latents | all
targets = "attention"  # attention | linear
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
references = 0  # images beside each one, of Qwen-Image
ema = False  # averaged weights of what is trained
text_millions = 4762  # weights of the text encoder

from parts.steps import optimizer_of, update  # noqa: E402
from parts.transformer import loaded, text_encoder, trained_weights  # noqa: E402

dtype = torch.bfloat16
kept = dtype if base_precision == "16bit" else torch.float32
encoder = text_encoder(text_millions, quantization) if cached == "latents" else None
transformer, layers = loaded(model, kept, quantization)
if targets == "attention":
    attention = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out")
    layers = [name for name in layers if name.endswith(attention)]
trained = trained_weights(
    transformer, rank, layers, torch.float32, gradient_checkpointing, checkpoints, blocks_swapped
)
steps, averaged = optimizer_of(trained, optimizer, ema)
config, rows = transformer.config, size // 16


def predicted(noisy, sigma):
    if "cap_feat_dim" in config:  # Z-Image: lists of images and of texts
        texts = torch.zeros(micro_batch, 512, config.cap_feat_dim, dtype=dtype, device="cuda")
        return torch.stack(
            transformer(list(noisy.unbind()), 1 - sigma, list(texts.unbind()), return_dict=False)[0]
        )
    texts = torch.zeros(micro_batch, 512, config.joint_attention_dim, dtype=dtype, device="cuda")
    if "approximator_layers" in config:  # Chroma
        places = torch.zeros(rows * rows, 3).cuda(), torch.zeros(512, 3).cuda()
        seen = torch.ones(micro_batch, 512 + rows * rows, dtype=torch.bool, device="cuda")
        return transformer(noisy, texts, sigma, *places, seen, return_dict=False)[0]
    if (
        "axes_dims_rope" in config and len(config.axes_dims_rope) == 4
    ):  # FLUX.2: four coordinates of each token
        places = {
            "img_ids": torch.zeros(rows * rows, 4).cuda(),
            "txt_ids": torch.zeros(512, 4).cuda(),
        }
        guidance = torch.ones(micro_batch, device="cuda") if config.guidance_embeds else None
        return transformer(noisy, texts, sigma, guidance=guidance, **places, return_dict=False)[0]
    shapes = [[(1, rows, rows)] * (1 + references)] * micro_batch
    seen = torch.cat([noisy] * (1 + references), 1)
    return transformer(seen, texts, None, sigma, shapes, return_dict=False)[0][:, : rows * rows]


shape = (
    (16, 1, size // 8, size // 8) if "cap_feat_dim" in config else (rows * rows, config.in_channels)
)
for _ in range(2):
    latents = torch.zeros(micro_batch, *shape, dtype=dtype).cuda()
    noise, sigma = torch.randn_like(latents), torch.rand(micro_batch, device="cuda", dtype=dtype)
    mixed = sigma.view(-1, *[1] * len(shape))
    with torch.autocast("cuda", dtype):
        velocity = predicted((1 - mixed) * latents + mixed * noise, sigma)
    update((velocity.float() - (noise - latents).float()).square().mean(), trained, steps, averaged)
