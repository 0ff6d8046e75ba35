NPROC_PER_NODE=4 \
swift sft \
    --model Qwen/Qwen2.5-7B \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 2 \
    --packing true \
    --max_length 16384 \
    --deepspeed zero3 \
    --use_liger_kernel true \
    --attn_impl flash_attn
