"""Between tokens and people: tokenizers, chat templates, and text as it is generated."""
