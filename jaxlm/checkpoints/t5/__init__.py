"""Checkpoints of T5's own trainers, T5X and Mesh TensorFlow, read as ours."""
