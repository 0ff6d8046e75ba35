accelerate launch --num_cpu_threads_per_process=8 train_network.py \
  --pretrained_model_name_or_path="runwayml/stable-diffusion-v1-5" \
  --resolution="768,768" \
  --mixed_precision="no" \
  --network_module="networks.lora" \
  --network_dim="8" \
  --train_batch_size="1" \
  --optimizer_type="AdamW8bit" \
  --cache_latents \
  --max_train_steps="2000"
