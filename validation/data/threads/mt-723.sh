accelerate launch --num_cpu_threads_per_process 1 musubi-tuner/wan_train_network.py --task i2v-A14B \
  --dit wan22_i2v_14B_low_noise_bf16.safetensors --dataset_config mt-723-data.toml --xformers --mixed_precision bf16 \
  --fp8_base --fp8_scaled --blocks_to_swap 38 --gradient_checkpointing --optimizer_type adamw8bit \
  --network_module networks.lora_wan --network_dim 32
