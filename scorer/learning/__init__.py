"""Learning Percentage (LP): training a model on the records and scoring them after each epoch."""
