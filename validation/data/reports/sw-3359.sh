NPROC_PER_NODE=3 \
swift rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --train_type lora \
    --lora_rank 12 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --max_completion_length 2048 \
    --per_device_train_batch_size 8 \
    --num_generations 8 \
    --use_vllm true \
    --vllm_device auto \
    --deepspeed zero3
