"""What measuring commands share: the report, its text, JSON and pictures, numbers over runs, options."""
