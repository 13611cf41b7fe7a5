"Training: the offline base model and supervised fine-tuning"
