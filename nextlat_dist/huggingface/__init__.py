"""Hugging Face export and its on-disk layout. Imports neither training nor DeepSpeed."""
