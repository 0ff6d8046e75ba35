NPROC_PER_NODE=1 \
swift rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --train_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --max_length 2048 \
    --max_completion_length 1024 \
    --per_device_train_batch_size 2 \
    --num_generations 2 \
    --use_vllm true \
    --vllm_device auto \
    --deepspeed zero3
