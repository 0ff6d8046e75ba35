NPROC_PER_NODE=1 \
swift pt \
    --model Qwen/Qwen3-8B \
    --train_type full \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --packing true \
    --deepspeed zero3 \
    --max_length 3000 \
    --attn_impl flash_attn
