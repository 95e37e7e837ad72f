"""`barelm tokenizer`: train a vocabulary, encode with it, look at its tokens, compare it with others."""
