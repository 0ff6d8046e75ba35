NPROC_PER_NODE=2 \
swift rlhf \
    --rlhf_type simpo \
    --model Qwen/Qwen2.5-3B-Instruct \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --max_length 2048 \
    --deepspeed zero2
