NPROC_PER_NODE=7 \
swift rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen3-8B \
    --train_type lora \
    --torch_dtype bfloat16 \
    --max_length 16384 \
    --max_completion_length 8192 \
    --per_device_train_batch_size 2 \
    --num_generations 7 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_gpu_memory_utilization 0.4 \
    --sleep_level 1 \
    --offload_model true \
    --offload_optimizer true
