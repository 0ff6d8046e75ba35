NPROC_PER_NODE=8 \
swift sft \
    --model Qwen/Qwen2.5-3B-Instruct \
    --tuner_type lora \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --max_length 65536 \
    --attn_impl flash_attn \
    --sequence_parallel_size 8 \
    --use_logits_to_keep false \
    --padding_free true
