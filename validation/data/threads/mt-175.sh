accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 hv_train_network.py \
  --dit mp_rank_00_model_states.pt --dataset_config mt-175-data.toml --sdpa --mixed_precision bf16 --fp8_base \
  --blocks_to_swap 24 --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing \
  --network_module networks.lora --network_dim 32 --timestep_sampling shift --discrete_flow_shift 7.0 \
  --max_train_epochs 16 --seed 42
