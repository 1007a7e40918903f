"""The parts of train_moe_lm.py: text, model, measurement, check and pictures."""
