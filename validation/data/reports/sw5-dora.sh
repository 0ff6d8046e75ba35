swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --tuner_type lora \
    --use_dora true \
    --per_device_train_batch_size 1 \
    --lora_rank 8 \
    --lora_alpha 32 \
    --gradient_accumulation_steps 16
