"""Published figures next to what the planner computes."""
