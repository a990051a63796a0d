"""Does a selection help? Fine-tune a model on it and on baselines, and compare them on held-out records."""
