export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
NPROC_PER_NODE=4 \
swift sft \
    --train_type lora \
    --model Qwen/Qwen3-30B-A3B \
    --quant_bits 4 \
    --target_modules q_proj k_proj v_proj o_proj \
    --lora_rank 8 \
    --lora_alpha 16 \
    --max_length 512 \
    --gradient_checkpointing true \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16
