"""Forms of base model: those that are more than a Llama, and what their exports need."""
