accelerate launch --num_cpu_threads_per_process=8 train_network.py \
  --pretrained_model_name_or_path="runwayml/stable-diffusion-v1-5" \
  --resolution="512,512" \
  --mixed_precision="fp16" \
  --network_module="networks.lora" \
  --network_dim="8" \
  --train_batch_size="1" \
  --optimizer_type="AdamW8bit" \
  --cache_latents \
  --gradient_checkpointing
