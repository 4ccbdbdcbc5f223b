"""How figures are shown: in the terminal, and on a page with plots."""
