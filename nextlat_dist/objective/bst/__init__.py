"""The Belief State Transformer: its objective, its pairs and their losses, its second stack and its text head."""
