accelerate launch --num_cpu_threads_per_process=8 sdxl_train_network.py \
  --pretrained_model_name_or_path="sd_xl_base_1.0.safetensors" \
  --resolution="1024,1024" \
  --mixed_precision="fp16" \
  --network_module="networks.lora" \
  --network_dim="8" \
  --train_batch_size="1" \
  --optimizer_type="AdamW8bit" \
  --cache_latents
