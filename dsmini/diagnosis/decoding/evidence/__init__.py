"""Evidence for decoding: experiments whose outcome is predicted first, one a file."""
