"""`lowrank-ext dpo`: preference pairs by TRL's DPOTrainer, on the loop of finetune."""
