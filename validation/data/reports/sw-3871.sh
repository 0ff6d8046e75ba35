NPROC_PER_NODE=8 \
swift rlhf \
    --rlhf_type grpo \
    --model Qwen/QwQ-32B \
    --attn_impl flash_attn \
    --gradient_checkpointing true \
    --use_vllm false \
    --train_type full \
    --torch_dtype bfloat16 \
    --max_completion_length 2048 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --max_length 2048 \
    --num_generations 8 \
    --deepspeed zero3 \
    --offload_model true \
    --offload_optimizer true
