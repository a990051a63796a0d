"""Files in, records and token sequences out, and selected records written."""
