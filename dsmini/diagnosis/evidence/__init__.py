"""Evidence beside the verdict: experiments whose outcome is predicted first, one a file."""
