"""LoRA of CogVideoX with diffusers, as CogVideoX-factory's cogvideox_text_to_video_lora.py with latents at hand.

- latents of videos and embeddings of texts were computed before: VAE and text encoder are not on the card
- the transformer and its LoRA in 16 bits under autocast; LoRA on the attention's projections
- rank 0 trains all of the transformer, in fp32 under autocast, as cogvideox_text_to_video_sft.py
"""

import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

model = "THUDM/CogVideoX-5b"
micro_batch = 1  # videos of a batch
frames = 49
height = 480  # pixels
width = 720  # pixels
precision = "bf16"  # bf16 | fp16
rank = 128  # of LoRA; 0 trains all weights
blocks_swapped = 0  # blocks that wait on the host; 0: none
gradient_checkpointing = True
checkpoints = "card"  # card | host
optimizer = "adamw"  # adamw | adamw_8bit | adafactor
ema = False  # averaged weights of what is trained

from parts.steps import optimizer_of, update  # noqa: E402
from parts.transformer import trained_weights  # noqa: E402

dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
transformer = CogVideoXTransformer3DModel.from_pretrained(
    model, subfolder="transformer", torch_dtype=dtype
)
if not rank:
    transformer.cuda().float()
layers = ["to_k", "to_q", "to_v", "to_out.0"]
trained = trained_weights(
    transformer, rank, layers, None, gradient_checkpointing, checkpoints, blocks_swapped
)
steps, averaged = optimizer_of(trained, optimizer, ema)
scheduler, config = CogVideoXDPMScheduler(), transformer.config
kept = scheduler.alphas_cumprod.cuda()
for _ in range(2):
    count, rows, columns = (frames - 1) // 4 + 1, height // 8, width // 8
    latents = torch.zeros(micro_batch, count, 16, rows, columns, dtype=dtype).cuda()
    texts = torch.zeros(
        micro_batch, config.max_text_seq_length, config.text_embed_dim, dtype=dtype
    ).cuda()
    times = torch.randint(0, 1000, (micro_batch,), device="cuda")
    rotary = None
    if config.use_rotary_positional_embeddings:
        grid = rows // 2, columns // 2
        rotary = get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), grid), grid, count, device="cuda"
        )
    noisy = scheduler.add_noise(latents, torch.randn_like(latents), times)
    with torch.autocast("cuda", dtype):
        predicted = transformer(noisy, texts, times, image_rotary_emb=rotary, return_dict=False)[0]
    predicted = scheduler.get_velocity(predicted.float(), noisy, times)
    weights = (1 / (1 - kept[times])).view(-1, 1, 1, 1, 1)
    loss = (weights * (predicted - latents) ** 2).reshape(micro_batch, -1).mean(1).mean()
    update(loss, trained, steps, averaged)
