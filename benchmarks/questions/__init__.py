"""One question a file, each with its QUESTION; ../question.py says what that is."""
