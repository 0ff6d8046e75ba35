swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --tuner_type full \
    --lisa_activated_layers 2 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16
