"""Text: where documents come from, how they are split, and the tokenizer."""
