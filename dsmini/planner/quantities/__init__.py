"""Numbers with a unit that know how they were computed. Start with quantity."""
