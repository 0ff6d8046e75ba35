accelerate launch train_dreambooth_lora_flux.py \
  --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev --mixed_precision="bf16" \
  --instance_prompt="a photo" --resolution=512 --train_batch_size=1 --guidance_scale=1 \
  --gradient_accumulation_steps=4 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500 \
  --validation_prompt="a photo" --validation_epochs=25 --seed="0" --optimizer="prodigy" --learning_rate=1.
