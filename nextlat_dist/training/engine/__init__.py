"""The engine that holds the weights and steps the optimizer: a protocol, and its binding to DeepSpeed."""
