accelerate launch --mixed_precision bf16 flux_train_network.py \
  --pretrained_model_name_or_path flux1-dev.safetensors --network_module networks.lora_flux --network_dim 8 \
  --network_train_unet_only --train_batch_size 1 --resolution 512,512 --optimizer_type adamw8bit --fp8_base \
  --gradient_checkpointing --cache_latents --cache_text_encoder_outputs --blocks_to_swap 35
