export MODEL_NAME="stabilityai/stable-diffusion-3-medium-diffusers"
accelerate launch train_dreambooth_sd3.py \
  --pretrained_model_name_or_path=$MODEL_NAME --mixed_precision="fp16" \
  --instance_prompt="a photo" --resolution=1024 --train_batch_size=1 \
  --gradient_accumulation_steps=4 --learning_rate=1e-4 --max_train_steps=500 \
  --validation_prompt="a photo" --validation_epochs=25
