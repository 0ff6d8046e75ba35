accelerate launch --num_cpu_threads_per_process=8 flux_train_network.py \
  --pretrained_model_name_or_path="flux1-dev.safetensors" \
  --resolution="512,512" \
  --mixed_precision="bf16" \
  --network_module="networks.lora_flux" \
  --network_dim="8" \
  --network_alpha="1" \
  --train_batch_size="1" \
  --cache_latents \
  --cache_latents_to_disk
