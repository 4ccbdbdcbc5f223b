"""Between tokens and people: tokenizers, chat templates, text while it comes, and where it stops."""
