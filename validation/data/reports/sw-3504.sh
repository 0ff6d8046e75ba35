VIDEO_MAX_PIXELS=16384 \
NPROC_PER_NODE=4 \
swift sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --train_type full \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --max_length 1024 \
    --deepspeed zero3 \
    --freeze_vit false
