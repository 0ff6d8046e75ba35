NPROC_PER_NODE=4 \
swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --tuner_type lora \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 16 \
    --padding_free true \
    --attn_impl flash_attn \
    --lora_rank 16 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --modules_to_save embed_tokens lm_head \
    --gradient_accumulation_steps 1 \
    --max_length 2048 \
    --deepspeed zero2
