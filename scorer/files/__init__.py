"""Files and folders -> the raw values of their rows, and back."""
