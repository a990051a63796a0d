"""Raw rows -> records: prompts and responses."""
