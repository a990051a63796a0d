"""A model's name -> local files -> tokenizer and network."""
