"""Run configuration: one dataclass per section, YAML plus dotted overrides, one validation pass."""
