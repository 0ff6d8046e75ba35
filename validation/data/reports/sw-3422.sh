NPROC_PER_NODE=8 \
swift sft \
    --model_id_or_path Qwen/Qwen2.5-7B \
    --sft_type lora \
    --lora_rank 16 \
    --gradient_accumulation_steps 16 \
    --num_train_epochs 1 \
    --deepspeed default-zero2 \
    --use_flash_attn false \
    --max_length 10000
