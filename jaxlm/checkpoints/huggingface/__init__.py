"""Hugging Face models: adapters between their folders and ours, one file a family."""
