accelerate launch flux_train_network.py \
  --pretrained_model_name_or_path flux1-dev-fp8.safetensors --network_module networks.lora_flux --network_dim 16 \
  --resolution 1024,1024 --train_batch_size 1 --highvram --full_bf16 --mixed_precision bf16 --fp8_base \
  --gradient_checkpointing --gradient_accumulation_steps 1 --seed 23 --sdpa --cache_latents --cache_latents_to_disk \
  --cache_text_encoder_outputs --network_train_unet_only --optimizer_type AdamW8bit --max_train_epochs 3
