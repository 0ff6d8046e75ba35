CUDA_VISIBLE_DEVICES=0 \
swift sft \
    --model_id_or_path Qwen/Qwen2.5-32B-Instruct \
    --sft_type lora \
    --template_type qwen2_5 \
    --max_length 16384 \
    --lora_target_modules ALL \
    --tuner_backend unsloth \
    --use_liger True \
    --dtype fp16 \
    --lora_rank 8 \
    --lora_alpha 16 \
    --gradient_accumulation_steps 4 \
    --use_flash_attn True \
    --quantization_bit 4
