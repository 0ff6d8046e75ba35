accelerate launch --num_cpu_threads_per_process 2 --mixed_precision fp16 wan_train_network.py --task i2v-A14B \
  --dit wan2.2_i2v_low_noise_14B_fp16.safetensors --dit_high_noise wan2.2_i2v_high_noise_14B_fp16.safetensors \
  --offload_inactive_dit --preserve_distribution_shape --dataset_config mt-464-data.toml --sdpa \
  --mixed_precision fp16 --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing \
  --max_data_loader_n_workers 2 --network_module networks.lora_wan --network_alpha 32 --network_dim 32 \
  --timestep_sampling sigmoid --discrete_flow_shift 2.0 --max_train_epochs 100 --save_every_n_epochs 1 --seed 42 \
  --lr_scheduler cosine_with_restarts --vae_cache_cpu
