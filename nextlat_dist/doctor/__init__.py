"""What is missing before a run, in a sentence each; nothing here imports torch at its top."""
